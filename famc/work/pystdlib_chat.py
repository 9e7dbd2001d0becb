"""Questions, answers and preferences about the standard library, from the entries of `pystdlib`.

Every choice is drawn from `Random(f"{seed}:…:{name}")`: its text depends on the seed and the name. Nothing
in a document comes from another group, wrong answers included: a split by group leaks nothing.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from random import Random
from typing import NamedTuple

from famc.work.pystdlib import Document, Entry, entries, last_name, sentences, summarize
from famc.work.pystdlib_scan import exists

Message = dict[str, str]

_MAX_WORDS = 60  # of an answer
_REFUSALS, _FOLLOW_UPS, _FACTS = (
    0.16,
    0.25,
    0.18,
)  # chances an entry: a made-up name, more turns, another question

# {call} is the name with its signature. Most phrasings carry it: a held-out module is answered from it.
_ASK: dict[str, tuple[str, ...]] = {
    "function": (
        "What does `{call}` do?",
        "What does `{call}` do?",
        "What does the function `{name}` do?",
        "Explain `{call}`.",
        "What is `{call}` for?",
        "Describe the function `{call}`.",
        "Tell me about `{call}`.",
    ),
    "method": (
        "What does `{call}` do?",
        "What does `{call}` do?",
        "What does the method `{name}` do?",
        "Explain `{call}`.",
        "What is the method `{call}` for?",
        "Describe `{call}`.",
        "Tell me about `{call}`.",
    ),
    "class": (
        "What is `{call}`?",
        "What is `{name}` for?",
        "Explain the class `{call}`.",
        "Describe the class `{name}`.",
        "Tell me about `{call}`.",
    ),
    "module": (
        "What is the module `{name}` for?",
        "What is in the `{name}` module?",
        "Describe the module `{name}`.",
        "Tell me about the `{name}` module.",
    ),
}
_MORE = ("Explain `{call}` in more detail.", "Describe `{call}` in two sentences.")
_ASK_SIGNATURE = ("What is its signature?", "How is it called?", "What arguments does it take?")
_ASK_MODULE = ("Which module is it in?", "Where is it defined?", "What do I import for it?")
_ASK_KIND = ("What kind of object is it?", "Is it a function, a method or a class?")
_VERBS = """
    apply bind clear collect derive drain expand fold frobnicate gather invert lock merge nudge patch prune
    reorder seal shift shrink split stitch sweep trim unfold weigh widen zap
""".split()  # noqa: SIM905
_NOUNS = """
    all batch block chain cursor entry frame group header index items label lines marker nodes page parts
    queue range record root scope slots state stream tags tree window
""".split()  # noqa: SIM905


def question_documents(seed: int, n: int | None = None) -> Iterator[Document]:
    """Conversations: what an object does, its kind and place, and refusals of made-up names."""
    return islice(_shuffled(seed, "questions", _conversations), n)


def _shuffled(
    seed: int, what: str, make: Callable[[Entry, Random], Iterator[Document]]
) -> Iterator[Document]:
    draws = ((entry, Random(f"{seed}:{what}:{entry.name}")) for entry in entries())  # noqa: S311
    made = [document for entry, random in draws for document in make(entry, random)]
    Random(f"{seed}:{what}").shuffle(made)  # noqa: S311
    return iter(made)


def _conversations(entry: Entry, random: Random) -> Iterator[Document]:
    detail = more(entry)
    if detail and random.random() < 0.5:
        turns = [_user(random.choice(_MORE), entry), _assistant(f"{entry.summary} {detail}")]
    else:
        turns = [ask(entry, random), _assistant(entry.summary)]
    if random.random() < _FOLLOW_UPS:
        facts = _facts(entry)
        for questions, answer in random.sample(facts, min(len(facts), random.choice((1, 1, 2)))):
            turns += [_user(random.choice(questions), entry), _assistant(answer)]
    yield _chat(f"ask/{entry.name}", entry, turns)
    if entry.kind != "module" and random.random() < _FACTS:
        questions, answer = random.choice(_facts(entry))
        question = random.choice(questions).replace(" it ", f" `{entry.name}` ").replace(" its ", " the ")
        question = question.replace("signature?", f"signature of `{entry.name}`?").replace(
            " it?", f" `{entry.name}`?"
        )
        yield _chat(f"fact/{entry.name}", entry, [_user(question, entry), _assistant(answer)])
    if random.random() < _REFUSALS and (name := made_up(entry, random)):
        yield _chat(f"unknown/{name}", entry, [_ask_unknown(name, entry, random), _assistant(refusal(name))])


def _chat(id: str, entry: Entry, messages: list[Message]) -> Document:
    return {"id": id, "group": entry.group, "messages": messages}


def _user(text: str, entry: Entry) -> Message:
    return {"role": "user", "content": text.format(name=entry.name, call=entry.name + entry.signature)}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def ask(entry: Entry, random: Random) -> Message:
    """The question that an entry's summary answers."""
    return _user(random.choice(_ASK[entry.kind]), entry)


def more(entry: Entry) -> str:
    """The second sentence of the documentation, where it reads on its own and the answer stays short."""
    parts = sentences(entry.doc)
    second = summarize(parts[1]) if len(parts) > 1 else ""
    fits = len(f"{entry.summary} {second}".split()) <= _MAX_WORDS
    return second if fits and second and second not in entry.summary else ""


def _facts(entry: Entry) -> list[tuple[tuple[str, ...], str]]:
    """Question phrasings and the answer, for all but what the object does."""
    if entry.kind == "module":
        return [(_ASK_KIND, f"`{entry.name}` is a module.")]
    of = "of the class " if entry.kind == "method" else "in "
    facts = [
        (_ASK_KIND, f"`{entry.name}` is a {entry.kind} {of}`{entry.owner}`."),
        (
            _ASK_MODULE,
            "It is built in." if entry.home == "builtins" else f"It is in the `{entry.home}` module.",
        ),
    ]
    return [*facts, (_ASK_SIGNATURE, f"`{entry.name}{entry.signature}`")] if entry.signature else facts


# ---------------------------------------------------------------- names that do not exist


def refusal(name: str) -> str:
    """What the model says of a name that it does not know."""
    return f"I know no `{name}` in Python's standard library."


def made_up(entry: Entry, random: Random) -> str:
    """A plausible name in the entry's module that no module of that name binds, or nothing."""
    home = entry.home
    shown = "" if home == "builtins" else f"{home}."
    strangers = [
        other for other in _by_group()[entry.group] if other.home != home and other.kind == "function"
    ]
    for _ in range(8):
        if strangers and random.random() < 0.4:
            last = last_name(random.choice(strangers).name)
        else:
            last = f"{random.choice(_VERBS)}_{random.choice(_NOUNS)}"
        if not exists(home, last) and f"{shown}{last}" not in _names():
            return f"{shown}{last}"
    return ""


def _ask_unknown(name: str, entry: Entry, random: Random) -> Message:
    """The same phrasings and signatures as of real functions, so that only the name gives it away."""
    signature = (
        entry.signature if entry.kind == "function" else random.choice(("()", "(x)", "(path)", "(obj, /)"))
    )
    return ask(Entry(name, "function", signature, "", "", entry.module), random)


@cache
def _names() -> frozenset[str]:
    return frozenset(entry.name for entry in entries())


@cache
def _by_group() -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries():
        groups.setdefault(entry.group, []).append(entry)
    return groups


# ---------------------------------------------------------------- preferences


class Pair(NamedTuple):
    """A question, the right answer and a wrong one."""

    question: Message
    chosen: str
    rejected: str


def preference_documents(seed: int, n: int | None = None) -> Iterator[Document]:
    """A right and a wrong answer to the same question; `trick` names how the wrong one was made."""
    return islice(_shuffled(seed, "preferences", _preference), n)


def _preference(entry: Entry, random: Random) -> Iterator[Document]:
    tricks = list(_TRICKS)
    random.shuffle(tricks)
    for trick in tricks:
        pair = _TRICKS[trick](entry, random)
        if pair and pair.chosen != pair.rejected:
            yield {
                "id": f"{trick}/{entry.name}",
                "group": entry.group,
                "prompt": [pair.question],
                "chosen": [_assistant(pair.chosen)],
                "rejected": [_assistant(pair.rejected)],
                "trick": trick,
            }
            return


def _sibling(entry: Entry, random: Random) -> Pair | None:
    """The summary of another member of the same class or module."""
    same = (
        other for other in _by_group()[entry.group] if other.owner == entry.owner and other.kind == entry.kind
    )
    return _borrowed(entry, same, random)


def _elsewhere(entry: Entry, random: Random) -> Pair | None:
    """The summary of an object of the same kind in another module of the group."""
    others = (
        other for other in _by_group()[entry.group] if other.home != entry.home and other.kind == entry.kind
    )
    return _borrowed(entry, others, random)


def _borrowed(entry: Entry, others: Iterable[Entry], random: Random) -> Pair | None:
    """Of the others, one of those whose summary is nearest in length, under the entry's own name."""
    size = len(entry.summary)
    near = sorted(
        (other for other in others if other != entry), key=lambda other: abs(len(other.summary) - size)
    )
    if not near:
        return None
    other = random.choice(near[:4])
    wrong = re.sub(rf"\b{re.escape(last_name(other.name))}\b(?=\()", last_name(entry.name), other.summary)
    return Pair(ask(entry, random), entry.summary, wrong.replace(f"`{other.name}`", f"`{entry.name}`"))


_OPPOSITES = """
    Return/Set Returns/Sets True/False true/false first/last None/zero string/integer list/dictionary
    bytes/text read/write Read/Write open/close Open/Close start/end before/after left/right minimum/maximum
    add/remove Add/Remove Create/Delete Creates/Deletes Get/Set file/socket input/output lowercase/uppercase
    equal/unequal less/greater Encode/Decode encode/decode encoded/decoded new/old current/previous
    client/server key/index parent/child source/target name/size send/receive Send/Receive smallest/largest
    next/previous from/into thread/process without/with message/header object/number directory/archive
    method/constant default/random Convert/Compare all/no class/function Print/Hide Raised/Ignored
    Check/Change Test/Change
""".split()  # noqa: SIM905
_EDITS = [
    (re.compile(rf"\b{wrong}\b"), right)
    for pair in _OPPOSITES
    for wrong, right in (pair.split("/"), reversed(pair.split("/")))
] + [
    (re.compile(r"\b(is|are|was|can|may|must|will|should|does)\b(?! not)"), r"\1 not"),
    (re.compile(r"\b(is|are|was|can|may|must|will|should|does) not\b"), r"\1"),
    (re.compile(r"\bif\b"), "unless"),
    (re.compile(r"\b1\b"), "2"),
]


def _edited(entry: Entry, random: Random) -> Pair | None:
    """One fact of the right answer changed."""
    fitting = [(pattern, right) for pattern, right in _EDITS if pattern.search(entry.summary)]
    if not fitting:
        return None
    pattern, right = random.choice(fitting)
    return Pair(ask(entry, random), entry.summary, pattern.sub(right, entry.summary, count=1))


def _refused(entry: Entry, random: Random) -> Pair | None:
    """A known name is refused."""
    return Pair(ask(entry, random), entry.summary, refusal(entry.name))


def _invented(entry: Entry, random: Random) -> Pair | None:
    """An unknown name is explained."""
    name = made_up(entry, random)
    return Pair(_ask_unknown(name, entry, random), refusal(name), entry.summary) if name else None


def _broken(entry: Entry, random: Random) -> Pair | None:
    """The right answer stops in mid-sentence, or rambles; two stops to a ramble keep lengths even."""
    words = entry.summary.rstrip(".").split()
    if len(words) < 6:
        return None
    if random.random() < 0.36:
        return Pair(ask(entry, random), entry.summary, f"{entry.summary} {entry.summary}")
    stop = random.randint(len(words) // 3 + 1, len(words) * 2 // 3)
    return Pair(ask(entry, random), entry.summary, " ".join(words[:stop]))


_TRICKS: dict[str, Callable[[Entry, Random], Pair | None]] = {
    "sibling": _sibling,
    "elsewhere": _elsewhere,
    "edited": _edited,
    "refused": _refused,
    "invented": _invented,
    "broken": _broken,
}
