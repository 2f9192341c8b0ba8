"""Launchers: training on this machine, on a Ray cluster, or as a cluster job."""
