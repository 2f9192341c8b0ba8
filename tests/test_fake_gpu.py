"""No tensor of a step is on the wrong device, and nothing in it waits for the GPU: on fake tensors, without a GPU."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_gpu import CUDA, config, fake_gpu, micro_batch, network, whole
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from distrain.config import load_config
from distrain.inference.ensemble import CROPS, Ensemble
from distrain.inference.scoring import find_top_classes
from distrain.models.layers import AdaptiveAvgPool2d
from distrain.models.response_norm import _LocalResponseNormFunction
from distrain.optim.lars import LARS
from distrain.optim.optimizer import Optimizer
from distrain.rundir.checkpoint import CheckpointManager
from distrain.training.evaluate import score_samples
from distrain.training.forward_pass import predict_logits

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
MODELS = [
    {"name": "alexnet"},
    {"name": "alexnet2012"},
    {"name": "alexnet2012", "layers": "paper"},
    {"name": "alexnet_bn"},
    {"name": "alexnet_bn", "place": "after_pool", "affine": False},
]
LOSSES = [
    {"name": "cross_entropy", "label_smoothing": 0.1},
    {"name": "hinge", "form": "crammer_singer"},
    {"name": "hinge", "form": "weston_watkins"},
    {"name": "hinge", "form": "binary", "one_vs_rest": True},
    {"name": "l1"},
    {"name": "l2", "outputs": "logits"},
    {"name": "smooth_l1"},
    {"name": "huber"},
]
OPTIMIZERS = [
    {"name": "sgd"},
    {"name": "sgd", "form": "paper", "clip_norm": 1.0},
    {"name": "adam"},
    {"name": "adam", "decoupled": True, "clip_norm": 1.0},
    {"name": "lars"},
]
FACTORS = {
    "model": MODELS,
    "loss": LOSSES,
    "optimizer": OPTIMIZERS,
    "precision": ["fp32", "tf32", "bf16"],
    "reduction": [{"mode": "exact"}, {"mode": "fast"}],
    "data": [{"train": "x"}, {"train": "x", "normalise": "device"}],
}
GRID = [
    {"model": model, "precision": precision, "reduction": {"mode": mode}}
    for model, precision, mode in itertools.product(
        MODELS, ("fp32", "bf16"), ("exact", "fast")
    )
]
GRID += [
    {"model": {"name": "alexnet_bn"}, "optimizer": rule}
    for rule in (*OPTIMIZERS[:3], OPTIMIZERS[4])
]
GRID += [{"loss": loss} for loss in (*LOSSES[:3], *LOSSES[4:6], LOSSES[7])]


def pairwise(factors):
    """Cases in which each two values of two factors meet at least once: the fullest case first, greedily."""
    names = list(factors)
    values = {name: list(enumerate(factors[name])) for name in names}
    missing = {
        frozenset([(a, i), (b, j)])
        for a, b in itertools.combinations(names, 2)
        for (i, _), (j, _) in itertools.product(values[a], values[b])
    }
    cases = []
    while missing:
        case = dict(min(missing, key=sorted))
        for name in names:
            if name not in case:
                met = {
                    i: sum(
                        frozenset([(name, i), other]) in missing
                        for other in case.items()
                    )
                    for i, _ in values[name]
                }
                case[name] = max(met, key=lambda i: (met[i], -i))
        missing -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
        cases.append({name: factors[name][i] for name, i in case.items()})
    return cases


COVER = pairwise(FACTORS)


def test_the_cover_has_every_pair():
    assert len(GRID) == 30
    for a, b in itertools.combinations(FACTORS, 2):
        for x, y in itertools.product(FACTORS[a], FACTORS[b]):
            assert any(case[a] == x and case[b] == y for case in COVER), (x, y)
    assert len(COVER) < 60


@pytest.mark.parametrize("number", range(len(GRID)))
def test_the_grid(number):
    whole(config(**GRID[number]))


@pytest.mark.parametrize("number", range(len(COVER)))
def test_every_pair_of_choices(number):
    whole(config(**COVER[number]))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe(recipe):
    whole(load_config(recipe, ["global_batch=8", "virtual_workers=4"]))


def test_bf16_is_computed_in_bf16():
    """The stand-in for a GPU does what autocast does there, or the cases above would say nothing of it."""
    with fake_gpu(), torch.autocast("cuda", torch.bfloat16):
        x = torch.empty(2, 3, device=CUDA)
        assert (x @ x.T).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3).to(CUDA),
        lambda x: x.cpu().numpy(),
    ],
)
def test_what_waits_for_the_gpu_is_refused(wait):
    with (
        fake_gpu(),
        pytest.raises(
            (DataDependentOutputException, DynamicOutputShapeException, AssertionError)
        ),
    ):
        wait(torch.empty(3, device=CUDA))


def test_tensors_on_two_devices_are_refused():
    """As in the step of every model without batch normalisation, whose empty moments were on the CPU."""
    with fake_gpu(), pytest.raises(Exception, match="device"):
        torch.cat([torch.empty(1, device=CUDA), torch.empty(0)])


def test_backward_of_response_normalisation():
    with fake_gpu():
        x, gradient = (torch.empty(2, 96, 27, 27, device=CUDA) for _ in range(2))
        context = type(
            "Context", (), {"saved_tensors": (x,), "arguments": (2, 2.0, 2e-5, 0.75)}
        )()
        found = _LocalResponseNormFunction.backward(context, gradient)[0]
        assert found.device == CUDA


def test_average_pool_copies_its_matrices_once():
    with fake_gpu() as launches:
        layer, x = AdaptiveAvgPool2d(6, 6), torch.empty(2, 256, 1, 2, device=CUDA)
        layer(x)
        assert launches.counts["aten::_to_copy"] == 2
        layer(x)
        assert launches.counts["aten::_to_copy"] == 2


def test_lars_is_few_launches():
    """It was 3,890 when norms were summed chunk by chunk, each of 2^17 elements."""
    shapes = [
        (96, 3, 11, 11),
        (256, 48, 5, 5),
        (4096, 9216),
        (4096, 4096),
        (1000, 4096),
    ]
    with fake_gpu() as launches:
        parameters = {
            str(i): torch.nn.Parameter(torch.empty(s, device=CUDA))
            for i, s in enumerate(shapes)
        }
        optimizer = Optimizer(LARS(clip_norm=1.0), parameters)
        for p in parameters.values():
            p.grad = torch.empty_like(p, requires_grad=False)
        launches.counts.clear()
        optimizer._transform_gradients()
    assert launches.counts.total() < 60 * len(shapes)


def test_a_checkpoint_is_copied_into_pinned_memory_and_waited_for_once(monkeypatch):
    waited, made = [], []
    stream = type("Stream", (), {"synchronize": lambda self: waited.append(True)})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    empty = torch.empty

    def noting(*arguments, pin_memory=False, **options):
        made.append(pin_memory)
        return empty(*arguments, **options)

    with fake_gpu():
        tensors = {str(i): empty(4, 5, device=CUDA) for i in range(3)}
        monkeypatch.setattr(torch, "empty", noting)
        saving = object.__new__(CheckpointManager)
        saving._cpu_copies = {}
        found = saving._copy_to_cpu("model", tensors)
    assert {t.device.type for t in found.values()} == {"cpu"}
    assert made == [True] * 3
    assert waited == [True]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("crops", CROPS)
def test_an_evaluation_stays_on_the_gpu(crops, precision):
    """Until the results per image of a whole chunk are copied: of two networks, the last part returns them."""
    settings = config(precision=precision)
    with fake_gpu():
        model = network(settings).eval()
        batch = micro_batch(settings, 4, bad=True)
        ensemble = Ensemble(
            [partial(predict_logits, settings, model)] * 2, CROPS[crops]
        )
        num_parts = 2 * len(CROPS[crops].windows)
        *earlier, found = [ensemble.add_part(i % 2, batch) for i in range(num_parts)]
        assert earlier == [None] * (num_parts - 1)
        scores = score_samples(settings.loss, found.logits, batch.labels)
        top = find_top_classes(found.logits, found.probabilities)
        assert {t.device for t in (*scores, *top, *found[1:])} == {CUDA}
        with pytest.raises(AssertionError, match="waits for cuda"):
            top.classes.cpu()
