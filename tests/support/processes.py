"""A few processes in one gloo group that are asked to run functions together."""

import os
import signal
import sys
import traceback
import warnings
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Processes:
    """`world` processes with a process group; each call runs one function in all of them."""

    def __init__(self, world, directory):
        self.world, self.directory, self.starts = world, directory, 0
        self.start()

    def start(self):
        context = mp.get_context("spawn")
        self.ends, self.processes = [], []
        self.starts += 1
        store = f"{self.directory}/store{self.world}-{self.starts}"
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.world, store), daemon=True
            )
            process.start()
            self.ends.append(mine)
            self.processes.append(process)

    def run(self, function, *args):
        """Results of ``function(*args)`` in each process; a failure of any raises here.

        Processes are started anew, once and with a line on stderr, if glibc has aborted one: gloo's
        threads have been seen to end in a double free, once in some hundred runs.
        """
        try:
            return self._run(function, args)
        except (EOFError, BrokenPipeError):
            for process in self.processes:
                process.join(5)
            codes = [process.exitcode for process in self.processes]
            self.close()
            if -signal.SIGABRT not in codes:
                raise
            print(f"{function.__name__}: exit codes {codes}; started anew", file=sys.stderr)
            self.start()
            return self._run(function, args)

    def _run(self, function, args):
        for end in self.ends:
            end.send((function, args))
        results, waiting = [None] * len(self.ends), set(self.ends)
        while waiting:
            # A collective waits for ever when processes do not call the same ones.
            ready = wait(waiting, timeout=1200)
            received = [(self.ends.index(end), *end.recv()) for end in ready]
            if not ready or any(failed for _, failed, _ in received):
                self.close()
                said = [f"process {rank}:\n{x}" for rank, failed, x in received if failed]
                raise AssertionError("\n".join(said) or "the processes hang")
            for rank, _, result in received:
                results[rank] = result
            waiting -= set(ready)
        return results

    @property
    def alive(self):
        return all(process.is_alive() for process in self.processes)

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


def _serve(end, rank, world, store):
    # What torchrun would set; the store is a file, so nothing listens at the address.
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", MASTER_ADDR="localhost")
    os.environ.update(WORLD_SIZE=f"{world}", LOCAL_WORLD_SIZE=f"{world}", MASTER_PORT="29500")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch.distributed's own code
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        function, args = end.recv()
        try:
            end.send((False, function(*args)))
        except BaseException:
            end.send((True, traceback.format_exc()))
