"""famc, the family compiler: one YAML file in, a family of language models out.

It is a pipeline, and reads in this order:

    spec/        what a user writes; YAML text -> Spec, with the place of every value
    steps/       each kind of step: its parameters, what it reads, how much work it is (no torch)
    checks/      what is wrong with a spec once names are followed
    graph.py     Spec -> Graph of steps: only what is needed, each once
    select.py    `+0.6b/instruct`, `kind:export`: which steps a command is about
    backend.py   hardware, one YAML each in backends/;  cost/: parameters, FLOPs, memory, time, money (pure arithmetic)
    plan.py      Graph x backends x store -> Plan: keys, layouts, costs, statuses, reasons
    job.py       one step, ready to run: the JSON that a worker reads
    store.py     artifact folders: atomic, verified, record last
    run.py       Plan -> artifacts, on this machine;  publish.py: artifacts -> the released folders;  bench.py: their speed;
                 attempt.py: their answers
    report/      what people look at: tables, the live view, model cards
    cli.py       the command line, thin
    work/        HEAVY: one file a kind, run as processes; the only place that imports torch
"""

__version__ = "0.1.0"
