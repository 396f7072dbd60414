"""What tests of training share."""

import multiprocessing
import os
import sys
from multiprocessing import forkserver

import pytest


@pytest.fixture(scope="module")
def start():
    """Starts a function of kill_cases in a process; they are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_cases", "launch_cases"])
    with pytest.MonkeyPatch.context() as patch:  # the server looks there alone for what it preloads
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        forkserver.ensure_running()

    def begin(function, *args):
        process = context.Process(target=function, args=args)
        process.start()
        return process

    return begin
