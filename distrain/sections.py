"""The sections of a config that are the science: network, loss, optimizer and schedule, each one of several by name."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from distrain.fields import Section, result


class Network(Section):
    """What all networks named alexnet... have."""

    width: float = result(1.0, gt=0)
    """Factor on all channel and hidden unit counts, each rounded to a multiple of 8. [result]"""
    dropout: float = result(0.5, ge=0, lt=1)
    """Probability that a unit of the two hidden fully connected layers is dropped. [result]"""


class AlexNet(Network):
    """One tower without response normalisation, as torchvision has it (Krizhevsky 2014): the same state dict."""

    name: Literal["alexnet"] = result("alexnet")
    """alexnet. [result]"""


class AlexNet2012(Network):
    """The two towers of 2012. The paper and the released source differ; each difference is a choice."""

    name: Literal["alexnet2012"] = result("alexnet2012")
    """alexnet2012. [result]"""
    layers: Literal["source", "paper"] = result("source")
    """source: layer 1 is normalised before its ReLU, and layer 2 twice, over channels and over places; paper: ReLU,
    normalisation over channels, pooling in both. [result]"""
    lrn: Literal["source", "paper"] = result("source")
    """What alpha = 1e-4 multiplies: the mean of the five squares (source, and torch) or their sum (paper's formula).
    [result]"""
    init: Literal["source", "paper"] = result("source")
    """Standard deviation of the first weights: 0.01, in conv3 to conv5 0.03 (source), or 0.01 everywhere (paper).
    [result]"""


class AlexNetBN(Network):
    """The two towers with batch normalisation in place of response normalisation."""

    name: Literal["alexnet_bn"] = result("alexnet_bn")
    """alexnet_bn. [result]"""
    place: Literal["before_relu", "after_pool"] = result("before_relu")
    """before_relu: convolution, normalisation, ReLU, pooling (Ioffe and Szegedy 2015; Simon et al. 2016). after_pool:
    convolution, ReLU, pooling, normalisation, not after conv5 (the authors of LARS). [result]"""
    hidden: bool = result(False)
    """Whether the two hidden fully connected layers are normalised too, before their ReLU. [result]"""
    affine: bool = result(True)
    """Whether what is normalised is scaled and shifted, as learned. [result]"""
    eps: float = result(1e-5, gt=0)
    """Added to the variance. [result]"""
    running: float = result(0.1, gt=0, le=1)
    """What each step takes of the new moments into those that evaluation uses. [result]"""
    init: Literal["he", "gaussian"] = result("he")
    """First weights. he: N(0, 2 / fan in), biases 0 (He et al. 2015). gaussian: N(0, 0.01), 0.005 in the hidden fully
    connected layers, biases 0.01 and there 0.1 (the authors of LARS). [result]"""


class ImportedModel(Section):
    """A network of torchvision's, or the user's own."""

    name: str = result(pattern=r"^[^:]+:[^:]+$")
    """torchvision:NAME, or package.module:callable, which is called with the number of classes and returns an
    nn.Module from images (n, 3, crop, crop) to logits (n, classes). [result]"""
    options: dict[str, Any] = result({})
    """Further keyword arguments of the callable. [result]"""


class CrossEntropy(Section):
    """-log softmax of the label's logit, averaged over the valid samples of the global batch."""

    name: Literal["cross_entropy"] = result()
    """cross_entropy. [result]"""
    label_smoothing: float = result(0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes alike (Szegedy et al. 2016, section 7). [result]"""


class Hinge(Section):
    """A margin between the label's score and the others'."""

    name: Literal["hinge"] = result()
    """hinge. [result]"""
    form: Literal["weston_watkins", "crammer_singer", "binary"] = result("weston_watkins")
    """weston_watkins: the sum over all other classes (the multi-class SVM of lectures); crammer_singer: the worst other
    class alone; binary: max(0, margin - y s) with y = 1 or -1. [result]"""
    margin: float = result(1.0, gt=0)
    """By how much the label's score must be above. [result]"""
    one_vs_rest: bool = result(False)
    """For the binary form with more than two classes: the sum over one binary problem a class. [result]"""

    @field_validator("one_vs_rest")
    @classmethod
    def _belongs_to_binary(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("form") != "binary":
            raise ValueError("one_vs_rest belongs to form = binary: remove it, or set that form")
        return value


class Distance(Section):
    """A distance between outputs and the one-hot vector of the label, averaged over classes."""

    name: Literal["l1", "l2"] = result()
    """l1: mean absolute error; l2: mean squared error. [result]"""
    outputs: Literal["softmax", "logits"] = result("softmax")
    """What is compared with the one-hot vector. [result]"""


class SmoothDistance(Section):
    """A distance that is quadratic where it is small and linear where it is large, averaged over classes."""

    name: Literal["smooth_l1", "huber"] = result()
    """smooth_l1: x^2 / (2 threshold) or |x| - threshold / 2 (Girshick 2015); huber: that times the threshold (Huber
    1964). [result]"""
    outputs: Literal["softmax", "logits"] = result("softmax")
    """What is compared with the one-hot vector. [result]"""
    threshold: float = result(1.0, gt=0)
    """Where quadratic becomes linear: beta of smooth L1, delta of Huber. [result]"""


class Groups(Section):
    """What all optimizers have: biases may be treated unlike weights, as Krizhevsky's released source does."""

    decay_biases: bool = result(True)
    """Whether weight decay acts on biases and on the scales of normalisation, all that has one dimension. [result]"""
    bias_lr: float = result(1.0, gt=0)
    """Rate of biases over that of weights; the released source has 2. [result]"""
    clip_norm: float | None = result(None, gt=0)
    """Largest norm of the gradient of all parameters together; null: it is not clipped. [result]"""


class SGD(Groups):
    """Momentum SGD with weight decay, in torch's form or the paper's."""

    name: Literal["sgd"] = result()
    """sgd. [result]"""
    form: Literal["torch", "paper"] = result("torch")
    """torch: v <- momentum v + g + decay w; w <- w - lr v. paper: v <- momentum v - lr (g + decay w); w <- w + v
    (Krizhevsky et al. 2012, section 5). They differ where the rate changes: the paper's velocity keeps the old one.
    [result]"""
    momentum: float = result(0.9, ge=0, lt=1)
    """Share of the velocity that each step keeps. [result]"""
    nesterov: bool = result(False)
    """Look ahead along the velocity (Sutskever et al. 2013, as torch writes it). [result]"""
    weight_decay: float = result(5e-4, ge=0)
    """Factor of the weights added to the gradient. [result]"""

    @field_validator("nesterov")
    @classmethod
    def _has_momentum(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("momentum"):
            raise ValueError("nesterov needs momentum: raise it, or remove nesterov")
        if value and info.data.get("form") == "paper":
            raise ValueError("the paper's form has no nesterov: remove it, or set form = torch")
        return value


class Adam(Groups):
    """Adam (Kingma and Ba 2015), bias-corrected."""

    name: Literal["adam"] = result()
    """adam. [result]"""
    beta1: float = result(0.9, ge=0, lt=1)
    """Decay of the first moment. [result]"""
    beta2: float = result(0.999, ge=0, lt=1)
    """Decay of the second moment. [result]"""
    eps: float = result(1e-8, gt=0)
    """Added to the root of the second moment. [result]"""
    weight_decay: float = result(0.0, ge=0)
    """Factor of the weights. [result]"""
    decoupled: bool = result(False)
    """false: decay is added to the gradient; true: weights shrink by lr times decay (Loshchilov and Hutter 2019).
    [result]"""


class Lars(Groups):
    """Momentum SGD with a trust ratio for each layer (You, Gitman and Ginsburg 2017), the rate inside the velocity."""

    name: Literal["lars"] = result()
    """lars. [result]"""
    momentum: float = result(0.9, ge=0, lt=1)
    """Share of the velocity that each step keeps. [result]"""
    weight_decay: float = result(5e-4, ge=0)
    """Factor of the weights added to the gradient. [result]"""
    trust: float = result(0.001, gt=0)
    """Norm of a layer's step over the norm of its weights, at a rate of 1. [result]"""


class WarmUp(Section):
    """What all schedules have."""

    lr: float = result(gt=0)
    """Learning rate after the warm-up, a step on the mean gradient of the global batch. [result]"""
    warmup_epochs: float = result(0.0, ge=0)
    """Epochs in which the rate rises linearly to `lr` (Goyal et al. 2017, section 2.2). [result]"""


class Constant(WarmUp):
    """One learning rate for the whole run."""

    name: Literal["constant"] = result()
    """constant. [result]"""


class Step(WarmUp):
    """A learning rate that drops by a factor at given epochs."""

    name: Literal["step"] = result()
    """step. [result]"""
    drop_epochs: tuple[int, ...] = result(strict=False)
    """Epochs (from 0, the warm-up counted) at whose start the rate drops. [result]"""
    factor: float = result(0.1, gt=0, le=1)
    """What each drop multiplies the rate by. [result]"""


class Plateau(WarmUp):
    """A learning rate that drops when the validation error stops improving (Krizhevsky et al. 2012, section 5)."""

    name: Literal["plateau"] = result()
    """plateau. [result]"""
    patience: int = result(3, ge=1)
    """Epochs without more right validation samples than ever before, after which the rate drops. [result]"""
    drops: int = result(3, ge=1)
    """How often at most. [result]"""
    factor: float = result(0.1, gt=0, lt=1)
    """What each drop multiplies the rate by. [result]"""


class Polynomial(WarmUp):
    """lr (1 - t)^power, with t from 0 to 1 over the steps after the warm-up."""

    name: Literal["polynomial"] = result()
    """polynomial. [result]"""
    power: float = result(1.0, gt=0)
    """1: linear; 2: as LARS's authors trained (You et al. 2017). [result]"""


class Cosine(WarmUp):
    """Half a cosine from lr to 0 over the steps after the warm-up (Loshchilov and Hutter 2017)."""

    name: Literal["cosine"] = result()
    """cosine. [result]"""


class Geometric(WarmUp):
    """Equal drops after equal times, over the steps after the warm-up (the best of Krizhevsky's own diary)."""

    name: Literal["geometric"] = result()
    """geometric. [result]"""
    drops: int = result(3, ge=1)
    """How often the rate drops: the run has one level more. [result]"""
    total: float = result(250.0, gt=1)
    """lr over the last level's rate. [result]"""


MODELS = (AlexNet, AlexNet2012, AlexNetBN, ImportedModel)
LOSSES = (CrossEntropy, Hinge, Distance, SmoothDistance)
OPTIMIZERS = (SGD, Adam, Lars)
SCHEDULES = (Constant, Step, Plateau, Polynomial, Cosine, Geometric)
Loss = Annotated[CrossEntropy | Hinge | Distance | SmoothDistance, Field(discriminator="name")]
Optimizer = Annotated[SGD | Adam | Lars, Field(discriminator="name")]
Schedule = Annotated[Constant | Step | Plateau | Polynomial | Cosine | Geometric, Field(discriminator="name")]


def _kind_of_model(value: Any) -> str:
    """Which section a model's is, by its name: alexnet if it has none."""
    name = value.get("name", "alexnet") if isinstance(value, dict) else getattr(value, "name", None)
    return "that is imported" if isinstance(name, str) and ":" in name else str(name)


Model = Annotated[
    Annotated[AlexNet, Tag("alexnet")]
    | Annotated[AlexNet2012, Tag("alexnet2012")]
    | Annotated[AlexNetBN, Tag("alexnet_bn")]
    | Annotated[ImportedModel, Tag("that is imported")],
    Discriminator(_kind_of_model),
]
