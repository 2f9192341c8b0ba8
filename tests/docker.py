"""Carries the Dockerfile out where there is no Docker, stage by stage in chroots, and tries the image as clusters do.

    python3.12 tests/docker.py [FOLDER]

It needs root, Debian's debootstrap and iproute2, registries of Debian's and Python's packages as this machine is set up
for them, and 25 GB. This very Python stands in for the base image's, so it must be of the same minor version. Every
command has namespaces of its own: mounts and processes end with it, whatever happens. What is built stays in FOLDER.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What the base image has besides Debian's minimum and Python: the libraries that Python's modules are linked against.
LIBRARIES = (
    "ca-certificates,netbase,tzdata,libbz2-1.0,libexpat1,libffi8,liblzma5,libncursesw6,libreadline8,libsqlite3-0,"
    "libssl3,libuuid1,zlib1g"
)
SYSTEM_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Step:
    """An instruction: its keyword, its `--flags`, and what comes after them."""

    keyword: str
    flags: dict[str, str]
    text: str

    @property
    def words(self) -> list[str]:
        """The text as the list that it is, or as words of a shell."""
        return (
            json.loads(self.text)
            if self.text.startswith("[")
            else shlex.split(self.text)
        )


@dataclass
class Stage:
    """What begins with a FROM; texts of steps are not expanded yet."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)


@dataclass
class Image:
    """A root file system and how a container of it starts."""

    root: Path
    env: dict[str, str]
    workdir: str = "/"
    user: str = "0:0"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def output(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def parse_steps(text: str) -> Iterator[Step]:
    """Instructions of a Dockerfile: comments left out, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\[ \t]*\n", "", "\n".join(lines)).splitlines():
        if line.strip():
            keyword, rest = line.strip().split(maxsplit=1)
            flags = {}
            while match := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
                flags[match[1]] = match[2]
                rest = rest[match.end() :]
            yield Step(keyword.upper(), flags, rest)


def parse(text: str) -> list[Stage]:
    """The stages, with names that other stages know them by."""
    stages: list[Stage] = []
    arguments: dict[str, str] = {}
    for step in parse_steps(text):
        if step.keyword == "FROM":
            base, *name = re.split(
                r"\s+AS\s+", expand(step.text, arguments), flags=re.IGNORECASE
            )
            stages.append(Stage(name[0] if name else str(len(stages)), base))
        elif stages:
            stages[-1].steps.append(step)
        elif step.keyword == "ARG":
            arguments.update(assignments(step.text))
        else:
            raise ValueError(f"{step.keyword} before the first FROM")
    return stages


def expand(text: str, variables: dict[str, str]) -> str:
    """`$NAME` and `${NAME}` replaced, as Docker does outside of RUN."""
    return re.sub(
        r"\$(?:\{(\w+)\}|(\w+))",
        lambda match: variables.get(match[1] or match[2], ""),
        text,
    )


def assignments(text: str) -> dict[str, str]:
    """NAME=VALUE pairs of ARG, ENV and LABEL."""
    return dict(
        word.split("=", 1) if "=" in word else (word, "") for word in shlex.split(text)
    )


def ignore_rules(text: str) -> list[tuple[re.Pattern[str], bool]]:
    """Patterns of .dockerignore, and whether they take what they match back in."""
    rules = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            parts = line.lstrip("!").strip("/").split("/")
            names = [
                ".*" if part == "**" else re.escape(part).replace(r"\*", "[^/]*")
                for part in parts
            ]
            rules.append(
                (
                    re.compile("/".join(names).replace(".*/", "(?:.*/)?") + "(?:/.*)?"),
                    line.startswith("!"),
                )
            )
    return rules


def context(folder: Path) -> list[str]:
    """Files that COPY sees, relative to the folder: the last pattern that matches decides."""
    rules = ignore_rules((folder / ".dockerignore").read_text())
    kept = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in (".git", ".venv")]
        # os.walk lists links to folders among the folders, and does not follow them.
        links = [name for name in folders if os.path.islink(f"{parent}/{name}")]
        paths = (os.path.relpath(f"{parent}/{name}", folder) for name in links + files)
        kept += [
            path
            for path in paths
            if ([True] + [take for rule, take in rules if rule.fullmatch(path)])[-1]
        ]
    return sorted(kept)


def copy_from_context(
    folder: Path, sources: list[str], target: Path, into: bool
) -> None:
    """COPY: what a folder holds goes into the target, a file goes into it where that is a folder."""
    files = context(folder)
    for source in sources:
        source = source.strip("/")
        mine = [
            name for name in files if name == source or name.startswith(f"{source}/")
        ]
        if not mine:
            raise FileNotFoundError(f"COPY {source}: nothing of that name")
        for name in mine:
            place = target / (
                os.path.relpath(name, source)
                if name != source
                else Path(name).name
                if into
                else ""
            )
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, place, follow_symlinks=False)
            os.chown(place, 0, 0, follow_symlinks=False)


def copy_from_stage(root: Path, sources: list[str], target: Path) -> None:
    """COPY --from of folders."""
    target.mkdir(parents=True, exist_ok=True)
    for source in sources:
        folder = root / source.lstrip("/")
        subprocess.run(
            ["cp", "-a", "--no-preserve=ownership", f"{folder}/.", str(target)],
            check=True,
        )
        say(f"   layer: {size(folder) / 1e6:,.0f} MB")


def machine_pip() -> dict[str, str]:
    """This machine's settings of pip as variables for a chroot that sees this machine's files under /run/host."""
    listed = output(sys.executable, "-m", "pip", "config", "list")
    settings = re.findall(r"^(\S+)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE)
    moved = {}
    for _, name, value in sorted(settings, key=lambda setting: setting[0] == ":env:"):
        moved[f"PIP_{name.replace('-', '_').upper()}"] = re.sub(
            r"(?<![^ ])(file://)?/", r"\1/run/host/", value
        )
    return moved


def build_step(
    image: Image,
    step: Step,
    stages: dict[str, Image],
    arguments: dict[str, str],
    folder: Path,
) -> None:
    """Carry one instruction out on the root of its stage."""
    text = expand(step.text, {**arguments, **image.env})
    if step.keyword != "HEALTHCHECK" and not step.flags.keys() <= {"from"}:
        raise ValueError(f"{step.keyword}: of its flags, only --from is known here")
    if step.keyword == "RUN":
        run(
            image,
            [*image.shell, step.text],
            {**machine_pip(), **arguments, **image.env},
        )
    elif step.keyword == "COPY":
        *sources, target = shlex.split(text)
        place = image.root / os.path.normpath(
            os.path.join(image.workdir, target)
        ).lstrip("/")
        if "from" in step.flags:
            copy_from_stage(stages[step.flags["from"]].root, sources, place)
        else:
            copy_from_context(
                folder,
                sources,
                place,
                into=target.endswith(("/", ".")) or place.is_dir(),
            )
    elif step.keyword == "ARG":
        arguments.update(
            {
                name: arguments.get(name, value)
                for name, value in assignments(text).items()
            }
        )
    elif step.keyword == "ENV":
        image.env.update(assignments(text))
    elif step.keyword == "WORKDIR":
        image.workdir = os.path.join(image.workdir, text)
        (image.root / image.workdir.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif step.keyword == "HEALTHCHECK":
        image.health = Step("CMD", {}, step.text.removeprefix("CMD ")).words
    elif step.keyword in ("USER", "SHELL", "ENTRYPOINT", "CMD"):
        name = {"CMD": "command"}.get(step.keyword, step.keyword.lower())
        setattr(image, name, text if name == "user" else step.words)
    elif step.keyword not in ("LABEL", "EXPOSE"):
        raise ValueError(f"{step.keyword} is not known here")


def inside(
    image: Image, mounts: str, command: list[str], env: dict[str, str], *more: str
) -> list[str]:
    """A command in the image, with mounts and processes of its own; `$0` is the root in the script that mounts."""
    namespaces = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        f"--mount-proc={image.root}/proc",
        *more,
    ]
    variables = [f"{name}={value}" for name, value in env.items()]
    script = f'{mounts}\nexec chroot "$0" env -i -C "$@"'
    return [
        *namespaces,
        "sh",
        "-ec",
        script,
        str(image.root),
        image.workdir,
        *variables,
        *command,
    ]


def run(image: Image, command: list[str], env: dict[str, str]) -> None:
    """A RUN: root, the machine's network, its files under /run/host for pip."""
    mounts = """
        mount --rbind /dev "$0/dev"
        mount -t tmpfs run "$0/run"
        mkdir "$0/run/host"
        mount --rbind / "$0/run/host"
    """
    subprocess.run(inside(image, mounts, command, env), check=True)


def container(image: Image, command: list[str]) -> subprocess.CompletedProcess[str]:
    """What `docker run --read-only --tmpfs /tmp --cap-drop ALL --network none` would do, with volumes in /work."""
    mounts = """
        ip link set lo up
        mount --rbind "$0" "$0"
        mount --rbind /dev "$0/dev"
        for place in dev/shm tmp work/runs work/shards; do mount -t tmpfs -o mode=1777 tmpfs "$0/$place"; done
        mount -o remount,bind,ro "$0"
    """
    uid, gid = image.user.split(":")
    drop = [
        "setpriv",
        f"--reuid={uid}",
        f"--regid={gid}",
        "--clear-groups",
        "--no-new-privs",
        "--bounding-set=-all",
    ]
    start = inside(image, mounts, [*drop, *command], image.env, "--net")
    return subprocess.run(
        start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def base_image(root: Path, tag: str) -> Image:
    """Debian's minimum with this Python in /usr/local, in place of `python:VERSION-slim-SUITE`."""
    version, suite = re.fullmatch(r"python:([\d.]+)-slim-(\w+)", tag).groups()
    here = ".".join(map(str, sys.version_info[:3]))
    if version.split(".")[:2] != here.split(".")[:2]:
        sys.exit(
            f"the image has Python {version}: start this with that Python, not with {here}"
        )
    say(
        f"== {tag}: stood in for by debootstrap's {suite} and Python {here} of this machine"
    )
    filters = ["Created-By: Packages", "Label: Debian", f"Codename: {suite}"]
    mirror = output(
        "apt-get", "indextargets", "--format", "$(REPO_URI)", *filters
    ).split()[0]
    bootstrap = [
        "debootstrap",
        "--variant=minbase",
        f"--include={LIBRARIES}",
        suite,
        str(root),
        mirror,
    ]
    log = subprocess.run(
        ["unshare", "--mount", *bootstrap], capture_output=True, text=True, check=False
    )
    if log.returncode:
        sys.exit(log.stdout[-2000:] + log.stderr)
    (root / "etc/apt/apt.conf.d/00machine").write_text(
        output("apt-config", "dump", "Acquire")
    )
    lend_python(root / "usr/local")
    image = Image(root, {"PATH": SYSTEM_PATH})
    run(image, ["ldconfig"], image.env)
    return image


def lend_python(target: Path) -> None:
    """This interpreter, its library and pip; without tests and byte code, as in the image."""
    minor = "python{}.{}".format(*sys.version_info)
    prefix = Path(sys.base_prefix)

    def leave_out(folder: str, names: list[str]) -> set[str]:
        unwanted = {"__pycache__", "test", "tests", "idle_test"}
        if Path(folder).name == "site-packages":
            return {name for name in names if not name.startswith("pip")}
        return unwanted.intersection(names) | {
            name for name in names if name.endswith((".pyc", ".a"))
        }

    shutil.copytree(
        prefix / "lib" / minor,
        target / "lib" / minor,
        symlinks=True,
        ignore=leave_out,
        dirs_exist_ok=True,
    )
    for library in (prefix / "lib").glob("libpython*.so*"):
        shutil.copy2(library, target / "lib", follow_symlinks=False)
    shutil.copy2(prefix / "bin" / minor, target / "bin")
    for name in ("python", "python3"):
        (target / "bin" / name).symlink_to(minor)
    pip = target / "bin/pip"
    pip.write_text(
        "#!/usr/local/bin/python\nimport sys\nfrom pip._internal.cli.main import main\nsys.exit(main())\n"
    )
    pip.chmod(0o755)


def size(root: Path) -> int:
    """Bytes of all files."""
    return int(output("du", "-sb", str(root)).split()[0])


def privileged(root: Path) -> set[str]:
    """Files that run as somebody else."""
    return set(
        output(
            "find", str(root), "-type", "f", "-perm", "/6000", "-printf", "%P\n"
        ).split()
    )


def build(folder: Path, work: Path) -> tuple[Image, set[str]]:
    """All stages; the last one's image, and what Debian itself has of files that run as somebody else."""
    stages: dict[str, Image] = {}
    debian: set[str] = set()
    image = Image(work, {})
    for stage in parse((folder / "Dockerfile").read_text()):
        root = work / stage.name
        if stage.base in stages:
            say(f"== stage {stage.name}, from {stage.base}")
            subprocess.run(
                ["cp", "-a", str(stages[stage.base].root), str(root)], check=True
            )
            image = replace(
                stages[stage.base], root=root, env=dict(stages[stage.base].env)
            )
        else:
            image = base_image(root, stage.base)
            debian = privileged(root)
        stages[stage.name] = image
        arguments: dict[str, str] = {}
        for step in stage.steps:
            start = time.monotonic()
            say(f"-- {step.keyword} {' '.join(step.text.split())[:100]}")
            build_step(image, step, stages, arguments, folder)
            if step.keyword in ("RUN", "COPY"):
                say(f"   {time.monotonic() - start:.1f} s")
    return image, debian


TOKEN = "export RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n')"
BYTE_CODE = """
import os, sys, torch, torchvision, nvidia.dali, ray, obstore, boto3, pynvml, tensorboardX, mlflow, distrain.cli.main
cached = [m.__spec__.cached for m in sys.modules.values() if getattr(m, "__spec__", None) and m.__spec__.cached]
print(len(cached), "modules have byte code; torch", torch.__version__, "with CUDA", torch.version.cuda)
sys.exit(", ".join(path for path in cached if not os.path.exists(path)) or 0)
"""
IMAGES = """
import os, numpy, PIL.Image
for name in "ab":
    os.makedirs(f"/tmp/photos/{name}")
    for i in range(8):
        pixels = numpy.random.default_rng(i).integers(0, 256, (300, 260, 3), dtype="uint8")
        PIL.Image.fromarray(pixels).save(f"/tmp/photos/{name}/{i}.jpg")
"""


def trials(image: Image) -> Iterator[tuple[str, list[str]]]:
    """What is tried: in words, and the command, which must succeed."""
    health = f"{{ {shlex.join(image.health)}; }}"
    login = ["/bin/bash", "-lc", "--"]
    yield "the entry point", [*image.entrypoint, *image.command]
    yield "distrain --version", [*image.entrypoint, "--version"]
    yield (
        "ray in a login shell",
        [*login, "command -v python && distrain --version && ray --version"],
    )
    yield "imports, all with byte code", ["python", "-c", BYTE_CODE]
    yield (
        "the root is not written to",
        ["sh", "-c", "touch /tmp/x && ! touch /x /work/x /opt/distrain/x"],
    )
    yield "a command that is no Ray node is well", image.health
    train = "configs/alexnet-bn.yaml data.train=shards/train data.val=null run=runs/x epochs=1 global_batch=16"
    pack = f"python -c {shlex.quote(IMAGES)} && distrain pack /tmp/photos shards/train --geometry short:256"
    train = (
        f"{pack} && distrain train {train} virtual_workers=1 && ls runs/x/checkpoints"
    )
    yield "a recipe trains", ["bash", "-c", train]
    yield "a recipe by its name", ["distrain", "lr", "alexnet-bn", "--images=100000"]
    local = f"import ray, subprocess; ray.init(num_cpus=1); subprocess.run({image.health!r}, check=True)"
    yield "a command with a Ray of its own is well", ["python", "-c", local]
    start = f"ulimit -n 65536; {TOKEN}; ray start --head --num-cpus 1 --metrics-export-port 8080 > /tmp/log 2>&1"
    head = f"{start} || {{ cat /tmp/log; exit 1; }}; sleep 5; {health}"
    yield "Ray's head is well", [*login, head]
    freeze = "for p in /proc/[0-9]*; do if grep -qsx raylet $p/comm; then kill -STOP ${p#/proc/}; fi; done; sleep 15"
    yield "a Ray node that hangs is not", [*login, f"{head} && {freeze}; ! {health}"]


def attempt(image: Image) -> int:
    """Try everything; how much of it failed."""
    failed = 0
    for name, command in trials(image):
        start = time.monotonic()
        done = container(image, command)
        failed += done.returncode != 0
        verdict = "FAILED" if done.returncode else "ok"
        say(
            f"{verdict}: {name} (exit {done.returncode}, {time.monotonic() - start:.1f} s)"
        )
        for line in done.stdout.splitlines()[-40 if done.returncode else -4 :]:
            say(f"   | {line}")
    return failed


def main() -> int:
    """Build and try; the exit status says whether all is as it should be."""
    work, begin = (
        Path(
            sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp(prefix="distrain-image-")
        ),
        time.monotonic(),
    )
    try:
        image, debian = build(ROOT, work)
        say(
            f"== built in {time.monotonic() - begin:.0f} s; the image has {size(image.root) / 1e9:.2f} GB"
        )
        failed = attempt(image)
        more = privileged(image.root) - debian
        say(
            f"{'FAILED' if more else 'ok'}: setuid and setgid files are Debian's {len(debian)} {sorted(more) or ''}"
        )
        return int(failed > 0 or bool(more))
    finally:
        if not sys.argv[1:]:
            shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
