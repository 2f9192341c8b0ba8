from distrain.launch.room import Node, call_for, room, shortage
from distrain.settings import Cluster


def node(address, cpus, gpus=0.0, *, draining=False):
    total = {"CPU": 8.0, "GPU": 2.0}
    return Node(address, f"address of {address}", total, {"CPU": cpus, "GPU": gpus}, draining)


def test_room_counts_whole_workers_a_node():
    nodes = [node("a", 3.0), node("b", 1.0), node("c", 0.5), Node("d", "address of d", {}, {}, False)]
    assert room(Cluster(), nodes, held=[]) == 4
    assert room(Cluster(cpus_per_worker=2), nodes, held=[]) == 1


def test_gpus_bound_it_too():
    nodes = [node("a", 16.0, 4.0), node("b", 2.0, 8.0)]
    assert room(Cluster(cpus_per_worker=2, gpus_per_worker=1), nodes, held=[]) == 4 + 1


def test_our_own_workers_count_and_those_on_a_draining_node_do_not():
    nodes = [node("a", 0.0), node("b", 0.0, draining=True), node("c", 1.0)]
    assert room(Cluster(), nodes, held=["a", "a", "b"]) == 3


def test_what_is_missing_is_named():
    nodes = [node("a", 3.0), node("b", 1.0), node("c", 8.0, draining=True)]
    wants = Cluster(workers=(8, 8), gpus_per_worker=1)
    assert shortage(wants, nodes) == "the run asks for 8 GPUs (8 workers of 1), and the cluster has 4"
    wants = Cluster(workers=(9, 9), cpus_per_worker=2)
    assert shortage(wants, nodes) == "the run asks for 18 CPUs (9 workers of 2), and the cluster has 16"
    held = "the cluster has room for 4 of at least 9 workers, beside what others hold"
    assert shortage(Cluster(workers=(9, 9)), nodes) == held


def test_an_autoscaler_is_asked_for_whole_workers(monkeypatch):
    asked = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    call_for(Cluster(cpus_per_worker=4, gpus_per_worker=1), 2, [], [])
    call_for(Cluster(), 0, [node("a", 0.0)], [])
    assert asked == [[{"CPU": 4.0, "GPU": 1.0}] * 2, []]


def test_an_autoscaler_is_asked_for_what_others_hold_too(monkeypatch):
    """It takes what it is asked for as the size of the whole cluster."""
    asked = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    nodes = [node("a", 1.0, 2.0), node("b", 6.0, 0.0), node("c", 8.0, 2.0)]
    call_for(Cluster(cpus_per_worker=2), 3, nodes, held=["a", "b"])
    ours, others = {"CPU": 2.0, "GPU": 0.0}, [{"CPU": 5.0, "GPU": 0.0}, {"CPU": 0.0, "GPU": 2.0}]
    assert asked == [[ours] * 3 + others]
