"""From stages to what they need: models, mixes, sources, the tokenizer; each made once, on first demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from famc.checks import Names, split_ref
from famc.cost.parameters import count
from famc.graph.node import Node
from famc.spec.family import Mix, StageSpec
from famc.spec.load import Spec
from famc.spec.text import Path as Where
from famc.steps import KINDS, exports, others
from famc.steps.adopt import Adopt
from famc.steps.base import RUNTIME, Amount, Resolved, Setting, Training
from famc.steps.corpus import amount as corpus_amount
from famc.steps.corpus import work as corpus_work
from famc.steps.mine import mine_params, mine_work
from famc.steps.mixes import Wanted, mix_amount, mix_params, source_params
from famc.steps.retrieval import Contrastive, HardNegatives
from famc.steps.shapes import shape_of, shape_values
from famc.steps.trained import train_work


class Trained:
    """Follows names from what is published to what it needs. One instance a resolve."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.family = spec.family
        self.names = Names(spec)
        self.nodes: dict[str, Node] = {}
        self.given: dict[int, Resolved] = {}
        self.written: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
        self.published: dict[tuple[str, str], list[str]] = {}  # nodes by size and variant
        self.gated: set[int] = set()  # gates of the spec that became steps
        self.shapes = {size: shape_of(spec.family, size) for size in spec.family.sizes}
        self.params = {size: count(shape).total for size, shape in self.shapes.items()}
        full = spec.full or spec.family  # a rehearsal compares the sizes that the whole family would
        self.rank = {size: count(shape_of(full, size)).total for size in full.sizes}

    def add(self, node: Node) -> str:
        if node.name in self.nodes:
            return node.name
        backend = self.names.backend(node.name)
        self.nodes[node.name] = node if backend is None else replace(node, backend=backend)
        if node.size and node.variant:
            self.published.setdefault((node.size, node.variant), []).append(node.name)
        return node.name

    # --- stages ---------------------------------------------------------------------------------------------

    def stage(self, size: str, stage: str) -> str:
        """The node of a stage at a size, made with all it needs."""
        name = f"{size}/{stage}"
        if name in self.nodes:
            return name
        spec, origins = self.stage_at(size, stage)
        if isinstance(spec, Adopt):
            return self.add(self.adopt(name, size, spec, origins))
        assert isinstance(spec, Training)
        shape = self.shapes[size]
        inputs: dict[str, str] = {"tokenizer": self.tokenizer()}
        if spec.from_:
            inputs["model"] = self.model(spec.from_, size)
        if spec.data is not None:
            own = [k for k in self.names.overrides(stage, size) if "data" in spec.by[k]]
            data_name, mix, fmt = self.names.mix_of(".".join([stage, *own[-1:]]), spec.data)
            inputs["data"] = self.mix(data_name, mix, fmt)
            data = mix_amount(self.family, mix, fmt, self.source)
        else:
            data = Amount(0.0, 0.0)
        teacher = getattr(spec, "teacher", None)
        if teacher is not None:
            inputs["teacher"] = self.model(teacher, size)
        teacher_shape = (
            self.shapes[self.nodes[inputs["teacher"]].size or size] if teacher is not None else None
        )
        if isinstance(spec, Contrastive) and spec.hard_negatives:
            inputs["negatives"] = self.mine(size, spec, spec.hard_negatives, inputs, data)
        if id(spec) not in self.given:  # one object a stage and set of overrides: it lives as long as this
            self.given[id(spec)] = spec.written(origins.get)
        given = self.given[id(spec)]
        resolved = spec.fill(given, Setting(shape, self.params[size], data))
        values = dict(resolved.values)
        values["seed"] = self.family.family.seed
        parent = self.nodes[inputs["model"]].params.get("shape") if "model" in inputs else None
        values["shape"] = shape_values(shape, values, parent)
        for key in ("teacher",):
            values.pop(key, None)
        runtime = {key: values.pop(key) for key in sorted(RUNTIME) if key in values}
        work = train_work(spec, shape, values, data, teacher_shape)
        node = Node(
            name, spec.kind, size, None, values, runtime, resolved.reasons, inputs,
            shape=shape, work=work, missing=self.not_ready(spec.kind, values),
        )  # fmt: skip
        return self.add(node)

    def mine(
        self, size: str, stage: Contrastive, wanted: HardNegatives, inputs: Mapping[str, str], data: Amount
    ) -> str:
        """The node that mines a stage's negatives: one for all that ask for the same."""
        embedder = self.names.miner(stage, size)
        made = {"data": inputs["data"], "tokenizer": inputs["tokenizer"]}
        shape = None
        if embedder is not None:
            at, name = embedder
            made["model"] = self.stage(at, name)
            shape = self.shapes[at]
        params = mine_params(wanted.model_dump(), embedder is not None)
        by = "bm25" if embedder is None else f"{embedder[1]}" if embedder[0] == size else "-".join(embedder)
        base = address = f"{size}/mine/{inputs['data'].partition('/')[2]}.{by}"
        copy = 2
        while address in self.nodes and (
            self.nodes[address].params != params or self.nodes[address].inputs != made
        ):
            address, copy = f"{base}-{copy}", copy + 1
        work = mine_work(shape, data)
        return self.add(Node(address, "mine", size, None, params, inputs=made, shape=shape, work=work))

    def stage_at(self, size: str, stage: str) -> tuple[StageSpec, dict[str, str]]:
        """A stage with the overrides of the size's groups, backend and own name laid over it; who wrote each
        field.
        """
        keys = tuple(self.names.overrides(stage, size))
        if (stage, keys) not in self.written:
            self.written[stage, keys] = self.origins_of(stage, keys)
        return self.names.stage_at(stage, size), self.written[stage, keys]

    def origins_of(self, stage: str, keys: tuple[str, ...]) -> dict[str, str]:
        """Who wrote each field of a stage, with the overrides of `keys` laid over it."""
        spec = self.family.stages[stage]
        path: Where = ("stages", stage)
        written = {key: self.spec.origin(where) or "" for key, where in _fields(_raw(spec), path)}
        for key in keys:
            for changed, where in _fields(spec.by[key], (*path, "by", key)):
                written[changed] = f"by {key}, {self.spec.origin(where) or ''}"
        return written

    def model(self, ref: str, size: str) -> str:
        """The node that `stage`, `variant`, `stage@size` or `variant@size` means at a size."""
        name, at = split_ref(ref, size)
        stage = name if name in self.family.stages else self.names.stage_of(name, at)
        return self.stage(at, stage)

    def adopt(self, name: str, size: str, spec: Adopt, origins: Mapping[str, str]) -> Node:
        folder = self.spec.folder / spec.path if spec.path else None
        files = self.names.files.listing(folder) if folder else None
        values = {
            "path": str(spec.path) if spec.path else None,
            "files": files.digest if files else None,
            "hf": spec.hf,
            "revision": spec.revision,
            "license": spec.license,
            "shape": shape_values(self.shapes[size], {}),
        }
        missing = (
            (f"{folder} is not on this machine",) if folder and (files is None or not files.count) else ()
        )
        runtime = {"folder": str(folder.resolve())} if folder else {}
        return Node(
            name, "adopt", size, None, values, runtime, origins, {"tokenizer": self.tokenizer()},
            shape=self.shapes[size], work=exports.convert_work(self.params[size]), missing=missing,
        )  # fmt: skip

    def not_ready(self, kind: str, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Why this version of famc can plan a step but not run it."""
        missing = []
        if KINDS[kind].worker is None:
            missing.append(f"kind '{kind}' can be planned, but this version of famc has no worker for it")
        if values.get("fim"):
            missing.append(
                "fill-in-the-middle (fim) can be planned, but this version of famc does not train it"
            )
        if values.get("mode") == "on_policy":
            missing.append("on-policy distillation can be planned, but this version of famc does not run it")
        if values.get("modes"):
            missing.append("thinking modes can be planned, but this version of famc does not train them")
        return tuple(missing)

    # --- data -----------------------------------------------------------------------------------------------

    def source(self, name: str) -> Amount:
        return corpus_amount(self.nodes[self.data(name)].params)

    def data(self, name: str) -> str:
        """The corpus node of a source."""
        address = f"data/{name}"
        if address in self.nodes:
            return address
        source = self.family.data.sources[name]
        params, runtime, missing = source_params(self.spec, name, source, self.names.files)
        inputs: dict[str, str] = {}
        if source.from_:
            inputs["from"] = self.data(source.from_)
        if source.by:
            inputs["by"] = self.model(source.by, next(iter(self.family.sizes)))
        return self.add(
            Node(
                address,
                "corpus",
                params=params,
                runtime=runtime,
                inputs=inputs,
                work=corpus_work(params),
                missing=missing,
            )
        )

    def mix(self, name: str, mix: Mix, fmt: str) -> str:
        """The mix node: decontaminated against the held-out part of every source that an evaluation reads."""
        address = f"mix/{name}"
        if address in self.nodes:
            return address
        sources = list(dict.fromkeys(key.partition(".")[0] for key in mix.weights))
        inputs = {f"source.{s}": self.data(s) for s in sources}
        if fmt == "text" or mix.tokens:
            inputs["tokenizer"] = self.tokenizer()
        wanted = Wanted(tuple(self.names.eval_sources))
        params, missing = mix_params(self.spec, mix, fmt, wanted)
        for other in params["decontaminate"]["against"] if params["decontaminate"] else ():
            inputs[f"eval.{other}"] = self.data(other)
        tokens = mix_amount(self.family, mix, fmt, self.source).tokens
        return self.add(
            Node(address, "mix", params=params, inputs=inputs, work=others.mix_work(tokens), missing=missing)
        )

    def tokenizer(self) -> str:
        if "tokenizer" in self.nodes:
            return "tokenizer"
        t = self.family.tokenizer
        template, missing = self.names.template()
        inputs: dict[str, str] = {}
        params: dict[str, Any] = {"template": template, "kind": t.kind}
        runtime: dict[str, Any] = {}
        if t.adopt:
            folder = self.spec.folder / t.adopt
            files = self.names.files.listing(folder)
            params |= {
                "adopt": t.adopt,
                "files": files.digest if files else None,
                "bytes": 0,
                "rows": self.names.rows,
            }
            runtime["folder"] = str(folder.resolve())
            if not files or not files.count:
                missing = (*missing, f"{folder} is not on this machine")
        else:
            assert t.train_on is not None
            _, mix, _ = self.names.mix_of("tokenizer", t.train_on.mix)
            weights = {s: mix.weights[s] for s in mix.weights}
            for source in dict.fromkeys(key.partition(".")[0] for key in weights):
                inputs[f"source.{source}"] = self.data(source)
            params |= {
                "vocab": t.vocab or self.names.rows,
                "rows": self.names.rows,
                "bytes": t.train_on.bytes,
                "weights": weights,
                "special_tokens": list(others.SPECIAL_TOKENS),
                "seed": self.family.family.seed,
            }
        return self.add(
            Node(
                "tokenizer",
                "tokenizer",
                params=params,
                runtime=runtime,
                inputs=inputs,
                work=others.tokenizer_work(params),
                missing=missing,
            )
        )


def _raw(stage: StageSpec) -> dict[str, Any]:
    return stage.model_dump(exclude_unset=True, by_alias=True)


def _fields(values: Mapping[str, Any], path: Where) -> list[tuple[str, Where]]:
    """Fields that are written, with their places; those of `lr` one by one."""
    found: list[tuple[str, Where]] = [(key, (*path, key)) for key in values]
    lr = values.get("lr")
    names = list(lr) if isinstance(lr, Mapping) else ["peak"] if lr is not None else []
    return found + [(f"lr.{name}", (*path, "lr", name)) for name in names]
