"""Whether a cluster has started this process as one of several; asked before JAX is imported."""

import importlib.util
import os

# What a cluster sets in the processes that it starts, and JAX finds its neighbours by: `srun`, Open
# MPI's `mpirun`, TPUs on GKE. JAX itself detects TPU virtual machines, where libtpu is there.
_CLUSTERS = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES")


def is_joined_by_cluster() -> bool:
    """Whether JAX finds the other processes by what the cluster says in the environment."""
    # One task has the node for itself, all of its GPUs; JAX would take one GPU a task.
    if os.environ.get("SLURM_NTASKS") == "1" or os.environ.get("OMPI_COMM_WORLD_SIZE") == "1":
        return False
    if any(name in os.environ for name in _CLUSTERS):
        return True
    return importlib.util.find_spec("libtpu") is not None
