"""Data-parallel AlexNet training whose result does not depend on the cluster."""

__version__ = "0.1.0"
