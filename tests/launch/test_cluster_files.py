from pathlib import Path

CLUSTER = Path(__file__).parents[2] / "cluster"


def test_the_settings_shipped_are_those_that_are_asked_for():
    from distrain.launch.ray_cluster import RAY_HEAD_ENV

    lines = (CLUSTER / "ray.env").read_text().splitlines()
    assert dict(
        line.split("=") for line in lines if line and not line.startswith("#")
    ) == {
        **RAY_HEAD_ENV,
        "RAY_AUTH_MODE": "token",
        "GRPC_ENABLE_FORK_SUPPORT": "0",
    }
