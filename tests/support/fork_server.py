"""A program that imports the package once and then forks, for each job it is asked for, the processes which do it.

Started by forks.py: a job is a line on stdin, its answer a line on stdout. A child that has done its part ends as a program
does, with whatever was to be done before the interpreter's end.
"""

import gc
import json
import sys

import killed_process
import processes
import torch

KINDS = {"killed": killed_process.answer, "together": processes.answer}

if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is imported stays for good: children need not walk through it
    for request in sys.stdin:
        job = json.loads(request)
        print(json.dumps(KINDS[job.pop("kind")](**job)), flush=True)
