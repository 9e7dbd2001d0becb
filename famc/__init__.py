"""famc, the family compiler: one YAML file in, a family of language models out.

It is a pipeline, and reads in this order:

    spec/        what a user writes; YAML text -> Spec, with the place of every value
    steps/       each kind of step: its parameters, what it reads, how much work it is (no torch)
    checks/      what is wrong with a spec once names are followed
    graph/       Spec -> Graph of steps: only what is needed, each once
    select.py    `+0.6b/instruct`, `kind:export`: which steps a command is about
    backend/     accelerators, one YAML each in backends/;  hardware.py: those that a spec uses
    cost/        parameters, FLOPs, memory, time, money, the search for layouts (pure arithmetic)
    price/       one step on its hardware: layout, memory, seconds, and how sure that is
    plan.py      Graph x hardware x store -> Plan: keys, layouts, costs, statuses, reasons
    schedule/    tasks on limited nodes -> when each runs, and on how many;  planning.py: that of a plan, with an objective
    alternatives.py, whatif.py: the plan on other accelerators;  deployment.py: exports on devices;  saved.py: a plan in a file
    estimate.py  one training setup without a spec;  calibrate.py: this machine, measured
    job.py       one step, ready to run: the JSON that a worker reads
    store.py     artifact folders: atomic, verified, record last
    run.py       Plan -> artifacts, on this machine;  publish.py: artifacts -> the released folders;  bench.py: their speed;
                 attempt.py: their answers
    report/      what people look at: tables, the page of a plan, the live view, model cards
    cli.py       the command line;  commands/: one short function each
    work/        HEAVY: one file a kind, run as processes; the only place that imports torch
"""

__version__ = "0.1.0"
