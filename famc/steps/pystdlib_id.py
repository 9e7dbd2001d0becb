"""Which files of the running interpreter the `pydoc` family learns from, and a cheap identity of them.

The planner's keys need the identity without the extraction: this file imports only the standard library.
"""

import hashlib
import os
import re
import sys
import sysconfig
from pathlib import Path

STDLIB = Path(sysconfig.get_path("stdlib"))

# Not learnt from: tests, other people's packages, bundled programs, user interfaces, what acts when imported.
_FOLDERS = """
    __pycache__ __phello__ dist-packages distutils ensurepip idlelib lib2to3 pydoc_data site-packages test
    tests tkinter turtledemo venv
"""
_MODULES = """
    __hello__ __main__ _bootlocale _msi _overlapped _scproxy _tkinter _winapi antigravity msilib msvcrt nis nt
    ossaudiodev readline sitecustomize spwd this turtle usercustomize winreg winsound
"""
SKIPPED_FOLDERS = frozenset(_FOLDERS.split())
SKIPPED_MODULES = frozenset(_MODULES.split())
# Tables of code points and the build's own settings (which hold this machine's paths) are not prose or code.
_SKIPPED_PATHS = re.compile(
    r"encodings/(?:cp|mac_|iso8859_|koi8_|kz1048|ptcp154|tis_620|hp_roman8|palmos|aliases)|_sysconfigdata|"
    r"_sysconfig_vars|config-"
)


def source_files() -> list[tuple[str, int]]:
    """`(relative path, size)` of every Python source and extension module of the library, in sorted order."""
    top = [(entry.name, entry) for entry in sorted(os.scandir(STDLIB), key=lambda entry: entry.name)]
    stack = list(reversed(top))
    found: list[tuple[str, int]] = []
    while stack:
        path, entry = stack.pop()
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in SKIPPED_FOLDERS:
                inside = sorted(os.scandir(entry.path), key=lambda inner: inner.name, reverse=True)
                stack.extend((f"{path}/{inner.name}", inner) for inner in inside)
        elif path.endswith((".py", ".so", ".pyd")) and not _SKIPPED_PATHS.match(path):
            found.append((path, entry.stat().st_size))
    return [file for file in found if file[0].partition(".")[0] not in SKIPPED_MODULES]


def fingerprint() -> str:
    """Identify the library: version, platform, built-in modules, names and sizes of the files."""
    digest = hashlib.sha256()
    version = ".".join(map(str, sys.version_info))
    digest.update(f"{sys.implementation.name} {version} {sys.platform} {sys.builtin_module_names}\n".encode())
    for path, size in source_files():
        digest.update(f"{path}\0{size}\n".encode())
    return digest.hexdigest()
