from distrain.config import Cluster
from distrain.launch.room import Node, room


def node(address, cpus, gpus=0.0, *, draining=False):
    return Node(address, f"address of {address}", {"CPU": cpus, "GPU": gpus}, draining)


def test_room_counts_whole_workers_a_node():
    nodes = [node("a", 3.0), node("b", 1.0), node("c", 0.5), Node("d", "address of d", {}, False)]
    assert room(Cluster(), nodes, held=[]) == 4
    assert room(Cluster(cpus_per_worker=2), nodes, held=[]) == 1


def test_gpus_bound_it_too():
    nodes = [node("a", 16.0, 4.0), node("b", 2.0, 8.0)]
    assert room(Cluster(cpus_per_worker=2, gpus_per_worker=1), nodes, held=[]) == 4 + 1


def test_our_own_workers_count_and_those_on_a_draining_node_do_not():
    nodes = [node("a", 0.0), node("b", 0.0, draining=True), node("c", 1.0)]
    assert room(Cluster(), nodes, held=["a", "a", "b"]) == 3
