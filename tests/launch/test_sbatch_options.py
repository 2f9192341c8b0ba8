import pytest

from distrain.errors import UserError
from distrain.launch.sbatch_options import (
    count_cpus_per_task,
    count_gpus_per_node,
    get_option,
    set_number_of_nodes,
    set_option,
)


def script(*lines):
    return "\n".join(["#!/bin/bash", *lines, "srun me", ""])


@pytest.mark.parametrize(
    ("options", "found"),
    [
        # Without a count it is one.
        ("--gres=gpu", 1),
        ("--gres=gpu:a100", 1),
        ("--gres=gpu:4", 4),
        ("--gres gpu:4", 4),
        ("--gres=gres/gpu:2", 2),
        ("--gres=gres:gpu:2", 2),
        ("--gres=gpu=2", 2),
        # Types of every spelling.
        ("--gres=gpu:a100:4", 4),
        ("--gres=gpu:A100:4", 4),
        ("--gres=gpu:nvidia_a100-sxm4-80gb:4", 4),
        ("--gres=gpu:3g.20gb:1", 1),
        ("--gres=gpu:a100_3g.20gb:2", 2),
        ("--gres=gpu:1g.5gb", 1),
        # Among other resources, and of several types.
        ("--gres=gpu:a100:4,tmpdir:100", 4),
        ("--gres=tmpdir:100,gpu:a100:4", 4),
        ("--gres=gpu:a100:2,gpu:v100:2", 4),
        ("--gres=tmpdir:100", 0),
        ("--gres=gpumem:80", 0),
        ("--gres=none", 0),
        ("--gres=gpu:2(S:0)", 2),
        ("--gres=gpu:2(S:0,1),tmpdir:4", 2),
        ('--gres="gpu:a100:4"', 4),
        ("--gres='gpu:4'", 4),
        ("--gres=gpu:8 --gres=gpu:2", 2),
        # Per node.
        ("--gpus-per-node=4", 4),
        ("--gpus-per-node 4", 4),
        ("--gpus-per-node=A100:4", 4),
        ("--gpus-per-node=a100:2,v100:1", 3),
        ("--gpus-per-node=4#all", 4),
        ("--gpus-per-n=4", 4),
        # For the job.
        ("-G 8", 8),
        ("-G8", 8),
        ("-G a100:8", 8),
        ("--gpus=8", 8),
        ("--gpus=A100:4", 4),
        ("--gpus 8 --nodes 2", 4),
        ("-HN2 -G 8", 4),
        ("-N 2-4 -G 8", 4),
        ("-N 2 -G a100:4,v100:2", 3),
        # Per task and socket.
        ("--gpus-per-task=2", 2),
        ("--gpus-per-task=a100:1 --ntasks-per-node=4", 4),
        ("--gpus-per-task=1 -n 8 -N 2", 4),
        ("--tres-per-task=gres/gpu:2", 2),
        ("--tres-per-task=cpu:8,gres/gpu:a100:1 --ntasks-per-node=4", 4),
        ("--tres-per-task=cpu=8,gres/gpu=1", 1),
        ("--tres-per-task=cpu:8", 0),
        ("--gpus-per-task=1 --ntasks=4", 4),
        ("--gpus-per-socket=2 --sockets-per-node=2", 4),
        # Other options that look alike.
        ("--gpus-per-task=1 --gpu-bind=none --gres-flags=enforce-binding", 1),
        ("--cpus-per-gpu=4 --mem-per-gpu=8G", 0),
        ("--comment gpus=4", 0),
        ("--comment='--gpus=4'", 0),
        ("--requeue -G 4 --exclusive", 4),
    ],
)
def test_gpus_of_a_node(options, found):
    assert count_gpus_per_node(script(f"#SBATCH {options}"), "it") == found
    # The same behind tabs, and before a comment.
    assert (
        count_gpus_per_node(
            script("#SBATCH\t--time=1", f"#SBATCH\t  {options} # it"), "it"
        )
        == found
    )


@pytest.mark.parametrize(
    "line",
    [
        "##SBATCH --gres=gpu:4",
        "# SBATCH --gres=gpu:4",
        "#sbatch --gres=gpu:4",
        " #SBATCH --gres=gpu:4",
        "#SBATCH # --gres=gpu:4",
        "#SBATCH --time=1 #--gres=gpu:4",
    ],
)
def test_lines_that_sbatch_does_not_read(line):
    assert count_gpus_per_node(script(line), "it") == 0
    assert count_gpus_per_node(script(line, "", "#SBATCH -G 2"), "it") == 2


def test_sbatch_stops_at_the_first_command():
    lines = ["#SBATCH -G 2", "", "  # a comment", "module load x", "#SBATCH -G 4"]
    assert count_gpus_per_node(script(*lines), "it") == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            "--gpus-per-socket=a100:2",
            "--gpus-per-socket=2 in site.sbatch does not say how many GPUs a node has: "
            "use --gpus-per-node",
        ),
        (
            "-N 3 -G 8",
            "--gpus=8 in site.sbatch cannot be divided equally among its 3 nodes: use",
        ),
        (
            "-N 2 -G a100:3,v100:1",
            "--gpus=4 in site.sbatch cannot be divided equally among its 2 nodes: use",
        ),
    ],
)
def test_requests_that_do_not_say_what_a_node_has(options, sentence):
    with pytest.raises(UserError, match=sentence):
        count_gpus_per_node(script(f"#SBATCH {options}"), "site.sbatch")


@pytest.mark.parametrize(
    "options",
    [
        "--cpus-per-task=16",
        "--cpus-per-task 16",
        "-c16",
        "-c 16",
        "-Hc16",
        "-c '16'",
        "-c 4 -c 16",
        "--cpus-per-t=16",
        "--tres-per-task=gres/gpu:1,cpu:16",
        "--tres-per-task=cpu=16",
    ],
)
def test_cores_of_a_task(options):
    assert count_cpus_per_task(script(f"#SBATCH {options}")) == 16


def test_cores_that_are_not_named():
    assert count_cpus_per_task(script("#SBATCH --cpus-per-gpu=4 --mincpus=8")) == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "#SBATCH -J old -N 4 --gres=gpu:2",
            "#SBATCH --job-name=new -N 4 --gres=gpu:2",
        ),
        ("#SBATCH -Jold -N4", "#SBATCH --job-name=new -N4"),
        ("#SBATCH -HJ old # it", "#SBATCH -H --job-name=new # it"),
        ('#SBATCH\t--job-name="my old"\t-N 4', "#SBATCH\t--job-name=new\t-N 4"),
        ("#SBATCH --job-n old", "#SBATCH --job-name=new"),
        (
            "#SBATCH -N 4\n#SBATCH -J a\n#SBATCH -J b",
            "#SBATCH -N 4\n#SBATCH --job-name=new\n#SBATCH --job-name=new",
        ),
        ("##SBATCH -J old", "#SBATCH --job-name=new\n##SBATCH -J old"),
    ],
)
def test_an_option_is_replaced_and_all_others_stay(before, after):
    assert set_option(script(before), "job-name", "new") == script(after)
    assert get_option(script(after), "job-name") == "new"


def test_what_follows_the_first_command_is_left_alone():
    text = script("true", "#SBATCH -J old")
    found = set_option(text, "job-name", "new")
    assert found == script("#SBATCH --job-name=new", "true", "#SBATCH -J old")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("-N 2 --gpus=8", "--nodes=1-4 --gpus-per-node=4"),
        ("-N 2 -G a100:4,v100:2", "--nodes=1-4 --gpus-per-node=a100:2,v100:1"),
        ("-N 2 -G 3g.20gb:4", "--nodes=1-4 --gpus-per-node=3g.20gb:2"),
        ("-N 1 -G 4", "--nodes=1-4 --gpus-per-node=4"),
        (
            "-N 2 -G 8 --gpus-per-node=4",
            "--nodes=1-4 --gpus-per-node=4 --gpus-per-node=4",
        ),
        ("-N 2 --gres=gpu:4", "--nodes=1-4 --gres=gpu:4"),
    ],
)
def test_with_another_number_of_nodes_each_keeps_its_gpus(before, after):
    text = set_number_of_nodes(script(f"#SBATCH {before}"), "1-4")
    assert text == script(f"#SBATCH {after}")
