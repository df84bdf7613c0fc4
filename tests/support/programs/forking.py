"""What processes of tests are forked from has imported: nothing of it starts a thread, or touches a device."""

import multiprocessing
import os
from multiprocessing.context import ForkServerContext

# Everything of a program takes place on this machine's processor, in one thread.
QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def forking_context() -> ForkServerContext:
    """Where processes are forked from one that has imported everything; each pytest worker has one of its own."""
    context = multiprocessing.get_context("forkserver")
    # Read when the first process is forked, whichever test that is for.
    context.set_forkserver_preload(["tests.support.programs.imported"])
    return context


def be_quiet() -> None:
    """Makes this process one that computes on the processor, in one thread."""
    os.environ.update(QUIET)
