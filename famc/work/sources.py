"""Reading records: local files, a hub dataset, the standard library, installed packages. A malformed one stops the step.

A record's id is its own `id`, else `file:line`. Its group is `group_field`; else a one-document file is its
own group, and a record among others is its own.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from famc.errors import StepFailed, did_you_mean
from famc.steps.files import SUFFIXES, expand
from famc.work.text import COLUMNS, Body, Message, Pair, Record, contents

Row = tuple[int, Any]  # number from 1, value

ROLES = ("system", "user", "assistant", "tool")


def read(params: Mapping[str, Any], runtime: Mapping[str, Any]) -> Iterator[Record]:
    """The records of a source, in its order."""
    if params["format"] not in COLUMNS:
        raise StepFailed(f"no worker reads format '{params['format']}' yet", f"formats: {', '.join(COLUMNS)}")
    origin = params["origin"]
    if origin == "path":
        return _path(params, Path(runtime["path"]))
    if origin == "hf":
        return _hub(params)
    if origin == "pystdlib":
        return _pystdlib(params)
    if origin == "installed":
        return _installed(params)
    raise StepFailed(
        f"no worker reads sources of origin '{origin}' yet", "path, hf, pystdlib and installed can be read"
    )


def skipped(params: Mapping[str, Any], runtime: Mapping[str, Any]) -> list[str]:
    """Files that are passed over: below a folder those whose suffix says that they hold no data, in a package those
    that are no Python of this interpreter's version."""
    if params["origin"] == "installed":
        from famc.work.installed import package

        return [path for name in sorted(params["installed"]) for path in package(name).unread]
    if params["origin"] != "path" or not Path(runtime["path"]).is_dir():
        return []
    return [str(path) for path in expand(Path(runtime["path"])) if _suffix(path) is None]


# --- where records come from --------------------------------------------------------------------------------


def _pystdlib(params: Mapping[str, Any]) -> Iterator[Record]:
    from famc.work import pystdlib, pystdlib_chat, pystdlib_pairs

    makers: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "source": pystdlib.source_documents,
        "docs": pystdlib.doc_documents,
        "questions": lambda: pystdlib_chat.question_documents(params["seed"]),
        "preferences": lambda: pystdlib_chat.preference_documents(params["seed"]),
        "sentences": pystdlib_pairs.sentence_documents,
        "names": pystdlib_pairs.name_documents,
        "summaries": pystdlib_pairs.summary_documents,
    }
    for row in makers[params["pystdlib"]]():
        yield _record(
            {**params, "text_field": "text", "group_field": "group"}, row, f"pystdlib {row['id']}", row["id"]
        )


def _installed(params: Mapping[str, Any]) -> Iterator[Record]:
    from famc.work.installed import pair_documents

    for row in pair_documents(params["installed"]):
        yield _record({**params, "group_field": "group"}, row, f"installed {row['id']}", row["id"])


def _hub(params: Mapping[str, Any]) -> Iterator[Record]:
    import datasets

    name, split = params["hf"], params["split"]
    try:
        rows = datasets.load_dataset(name, revision=params["revision"], split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise StepFailed(
            f"cannot load '{name}' (revision {params['revision']}, split {split}): {_first_line(error)}",
            "check name, revision and split, and that the hub can be reached or its cache holds the dataset",
        ) from error
    for index, row in enumerate(rows, 1):
        yield _record(params, row, f"{name} {split}:{index}", f"{split}:{index}")


def _path(params: Mapping[str, Any], pattern: Path) -> Iterator[Record]:
    paths = expand(pattern)
    if not paths:
        raise StepFailed(f"{pattern}: no such file", "the path is relative to the spec's folder")
    base = _base(pattern)
    used = False
    for path in paths:
        suffix = _suffix(path)
        if suffix is None:
            if pattern.is_dir():
                continue  # reported by `skipped`
            raise StepFailed(f"{path}: unknown kind of file", f"known suffixes: {', '.join(SUFFIXES)}")
        used = True
        name = path.relative_to(base).as_posix()
        reader = _READERS.get(suffix)
        if reader is None:
            yield _whole_file(params, path, name, suffix)
            continue
        for number, value in reader(path):
            yield _record(params, value, f"{path}:{number}", f"{name}:{number}")
    if not used:
        raise StepFailed(f"{pattern}: no data files", f"known suffixes: {', '.join(SUFFIXES)}")


def _base(pattern: Path) -> Path:
    """The folder that names are relative to: of a glob, the part before the first wildcard."""
    if pattern.is_dir():
        return pattern
    base = Path(pattern.anchor)
    for part in pattern.parent.relative_to(pattern.anchor).parts:
        if any(sign in part for sign in "*?["):
            break
        base /= part
    return base


def _suffix(path: Path) -> str | None:
    return next(
        (suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(suffix)), None
    )


# --- kinds of files -----------------------------------------------------------------------------------------


def _whole_file(params: Mapping[str, Any], path: Path, name: str, suffix: str) -> Record:
    if params["format"] != "text":
        raise StepFailed(
            f"{path}: a {suffix} file holds text, not {params['format']}", "use jsonl, json, parquet or arrow"
        )
    if params.get("group_field"):
        raise StepFailed(
            f"{path}: a {suffix} file has no field '{params['group_field']}'", "leave group_field out"
        )
    text = _decode(_bytes(path), str(path), 1)
    return Record(name, name, text, str(path))


def _json_lines(path: Path) -> Iterator[Row]:
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        lines = enumerate(file, 1)
        while True:
            try:
                number, raw = next(lines)
            except StopIteration:
                return
            except (OSError, EOFError, zlib.error) as error:
                raise StepFailed(
                    f"{path}: not a whole gzip file: {_first_line(error)}", "write or copy the file again"
                ) from error
            line = _decode(raw, f"{path}:{number}", None).rstrip("\r\n")
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise StepFailed(
                        f"{path}:{number}:{error.colno}: not JSON: {error.msg}",
                        "every line is one JSON object",
                    ) from error


def _json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(_decode(_bytes(path), str(path), 1))
    except json.JSONDecodeError as error:
        hint = (
            "one object a line is .jsonl" if error.msg == "Extra data" else "the file is one list of objects"
        )
        raise StepFailed(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}", hint) from error
    if not isinstance(value, list):
        raise StepFailed(
            f"{path}:1: {_named(value)} instead of a list of objects", "the file is one list of objects"
        )
    yield from enumerate(value, 1)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=512):
                for value in batch.to_pylist():
                    number += 1
                    yield number, value
    except (pa.ArrowException, OSError) as error:
        raise StepFailed(
            f"{path}: not a parquet file that can be read: {_first_line(error)}", "write the file again"
        ) from error


def _arrow(path: Path) -> Iterator[Row]:
    try:
        with pa.memory_map(str(path)) as file:
            try:
                reader = pa.ipc.open_stream(file)  # what `datasets` writes
                batches = iter(reader)
            except pa.ArrowInvalid:
                table = pa.ipc.open_file(file)
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
            number = 0
            for batch in batches:
                for value in batch.to_pylist():
                    number += 1
                    yield number, value
    except (pa.ArrowException, OSError) as error:
        raise StepFailed(
            f"{path}: not an arrow file that can be read: {_first_line(error)}", "write the file again"
        ) from error


# a suffix that is not here holds one document
_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


def _bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StepFailed(
            f"{path}: not a whole gzip file: {_first_line(error)}", "write or copy the file again"
        ) from error


def _decode(raw: bytes, where: str, line: int | None) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        newlines = raw.count(b"\n", 0, error.start)
        at = where if line is None else f"{where}:{line + newlines}"
        raise StepFailed(
            f"{at}: not UTF-8: byte 0x{raw[error.start]:02x} at {error.start}", "convert the file to UTF-8"
        ) from error


# --- what a record holds ------------------------------------------------------------------------------------


def _record(params: Mapping[str, Any], row: Any, where: str, default_id: str) -> Record:
    if not isinstance(row, dict):
        raise StepFailed(
            f"{where}: {_named(row)} instead of an object", "every record is an object with named fields"
        )
    given = row.get("id")
    has_id = isinstance(given, str | int) and not isinstance(given, bool) and given != ""
    body = _BODIES[params["format"]](params, row, where)
    record = Record(str(given) if has_id else default_id, _group(params, row, where), body, where)
    for text in (record.id, record.group, *contents(body)):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise StepFailed(
                    f"{where}: half a surrogate pair (\\u{ord(text[error.start]):04x})",
                    "the text was cut or escaped wrongly; write it again",
                ) from error
    return record


def _group(params: Mapping[str, Any], row: Mapping[str, Any], where: str) -> str:
    field = params.get("group_field")
    if not field:
        return ""
    value = _field(row, field, where, "group_field")
    if not isinstance(value, str | int) or value == "":
        raise StepFailed(
            f"{where}: group_field '{field}' is {_named(value)}", "a group is a text or a whole number"
        )
    return str(value)


def _field(row: Mapping[str, Any], name: str, where: str, option: str = "") -> Any:
    if name not in row:
        hint = did_you_mean(name, row) or "the record is empty"
        raise StepFailed(
            f"{where}: no field '{name}'", f"{hint} ({option} names it in the spec)" if option else hint
        )
    return row[name]


def _text(params: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Body:
    value = _field(row, params["text_field"], where, "text_field")
    if not isinstance(value, str):
        raise StepFailed(f"{where}: field '{params['text_field']}' is {_named(value)} instead of text")
    return value


def _conversation(params: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Body:
    result = _messages(_field(row, "messages", where), "messages", where)
    if all(message["role"] != "assistant" for message in result):
        raise StepFailed(
            f"{where}: a conversation without a turn of the assistant",
            "there would be nothing to learn from it",
        )
    return result


def _preference(params: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Body:
    parts: dict[str, list[Message]] = {}
    for part, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        value = _field(row, part, where)
        parts[part] = (
            [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, part, where)
        )
    prompt = parts["prompt"]
    for part in ("chosen", "rejected"):
        if parts[part][: len(prompt)] == prompt:  # some datasets repeat the prompt in both answers
            parts[part] = parts[part][len(prompt) :]
        if not parts[part] or parts[part][-1]["role"] != "assistant":
            raise StepFailed(f"{where}: '{part}' does not end with a turn of the assistant")
    return parts


def _pair(params: Mapping[str, Any], row: Mapping[str, Any], where: str) -> Body:
    query = _field(row, "query", where)
    if not isinstance(query, str):
        raise StepFailed(f"{where}: 'query' is {_named(query)} instead of text")
    if not query.strip():
        raise StepFailed(f"{where}: an empty query", "a query is a text that is searched for")
    positives = _passages(row, "positive", where)
    negatives = _passages(row, "negative", where)
    if not positives:
        hint = "" if {"positive", "positives"} & row.keys() else f"{did_you_mean('positive', row)}: "
        raise StepFailed(
            f"{where}: a pair without positives", f"{hint}'positive' is one passage, 'positives' a list"
        )
    texts = {_spaced(text) for text in positives}
    if _spaced(query) in texts:
        raise StepFailed(
            f"{where}: a positive equal to the query", "a passage answers its query, it does not repeat it"
        )
    for index, text in enumerate(negatives):
        if _spaced(text) in texts:
            at = f"negatives[{index}]" if row.get("negatives") is not None else "negative"
            raise StepFailed(f"{where}: {at} is also a positive", "take it out of one of the two")
    return Pair(query, positives, negatives)


def _passages(row: Mapping[str, Any], one: str, where: str) -> tuple[str, ...]:
    """The passages that a record gives as one text (`positive`) or as a list (`positives`), each once; null, as
    parquet says of a missing value, is none."""
    many = f"{one}s"
    single, several = row.get(one), row.get(many)
    if single is not None and several is not None:
        raise StepFailed(f"{where}: both '{one}' and '{many}'", f"write one of the two: {many} is a list")
    if single is not None and not isinstance(single, str):
        raise StepFailed(f"{where}: '{one}' is {_named(single)} instead of text", f"a list is '{many}'")
    if several is not None and not isinstance(several, list):
        hint = f"one text is '{one}'" if isinstance(several, str) else '["…", …]'
        raise StepFailed(f"{where}: '{many}' is {_named(several)} instead of a list of texts", hint)
    given = [single] if single is not None else several or []
    for index, text in enumerate(given):
        at = f"{many}[{index}]" if single is None else f"'{one}'"
        if not isinstance(text, str):
            raise StepFailed(f"{where}: {at} is {_named(text)} instead of text")
        if not text.strip():
            raise StepFailed(f"{where}: {at} is empty", "a passage is a text that can be found")
    once: dict[str, str] = {}
    for text in given:
        once.setdefault(_spaced(text), text)
    return tuple(once.values())


def _spaced(text: str) -> str:
    return " ".join(text.split())


_BODIES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], str], Body]] = {
    "text": _text,
    "messages": _conversation,
    "preference": _preference,
    "pairs": _pair,
}


def _messages(value: Any, field: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise StepFailed(
            f"{where}: '{field}' is {_named(value)} instead of a list of messages",
            '[{"role": …, "content": …}, …]',
        )
    result = []
    for index, message in enumerate(value):
        at = f"{where}: {field}[{index}]"
        if not isinstance(message, dict):
            hint = '{"role": …, "content": …}'
            raise StepFailed(f"{at} is {_named(message)} instead of a message", hint)
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                what = f"has {_named(message[key])} as {key}" if key in message else f"has no {key}"
                raise StepFailed(f"{at} {what}", f"{key} is a text")
        if message["role"] not in ROLES:
            raise StepFailed(f"{at}: unknown role '{message['role']}'", did_you_mean(message["role"], ROLES))
        if message.get("tool_calls"):
            raise StepFailed(
                f"{at}: tool calls can't be read yet", "write them into content as the chat template would"
            )
        result.append({"role": message["role"], "content": message["content"]})
    return result


def _named(value: Any) -> str:
    if value is None:
        return "null"
    if value == []:
        return "an empty list"
    names = {
        str: "text",
        list: "a list",
        dict: "an object",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
