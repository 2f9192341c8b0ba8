"""One rank of a ring that watches its peers: `one_peer.py STORE RANK RANKS`. stdin says: leave, or give up."""

import sys
from datetime import timedelta

import torch.distributed as dist

from distrain.distributed.peer_monitor import PeerMonitor


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    path, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    store = dist.FileStore(path, ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=5))
    watch = PeerMonitor(group, rank, ranks, lambda: say("lost"))
    dist.barrier()
    say("watching")
    watch.leave_ring(failed="give up" in sys.stdin.readline(), timeout=60)
    say("left")


if __name__ == "__main__":
    main()
