"""``python -m apb_jax.sessions``: list, show, remove and prune the sessions that were saved to disk."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from dataclasses import asdict
from typing import NoReturn

from apb_jax.errors import UserError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, no usage dump."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_bytes(text: str) -> int:
    """Bytes: "0", "500M" (500 million), "50G"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)b?", text.strip().lower())
    if not match:
        raise UserError(f"--keep-bytes {text!r} is not a number of bytes; write for example 0, 500M or 50G")
    return int(float(match[1]) * UNITS[match[2]])


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m apb_jax.sessions``."""
    parser = _Parser(prog="python -m apb_jax.sessions", description="Sessions that were saved to disk.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")
    one = commands.add_parser("list", help="the sessions in a folder, the one used longest ago first")
    one.add_argument("root", metavar="DIR")
    one = commands.add_parser("show", help="what made a session, as JSON; its files against their sizes")
    one.add_argument("folder", metavar="SESSION")
    one = commands.add_parser("remove", help="remove sessions")
    one.add_argument("folders", nargs="+", metavar="SESSION")
    one = commands.add_parser("prune", help="remove the sessions used longest ago, and what was left unfinished")
    one.add_argument("root", metavar="DIR")
    one.add_argument("--keep-bytes", required=True, metavar="N", help="bytes that may stay: 0, 500M, 50G")
    return parser


def run(argv: list[str] | None) -> None:
    """Do what the command line asks for."""
    from apb_jax.session_store.folders import kept, prune, remove
    from apb_jax.session_store.manifest import read_manifest

    given = make_parser().parse_args(argv)
    if given.command == "list":
        for one in kept(given.root):
            used = datetime.datetime.fromtimestamp(one.used, datetime.UTC).isoformat(timespec="seconds")
            if one.manifest is None:
                print(f"{one.folder}\tdoes not load: {one.problem}")
                continue
            made = one.manifest
            tokens = "+".join(f"{n:,}" for n in made.document_tokens)
            facts = (f"{made.model}", made.method.asked, f"{made.method.shards} shards", f"{tokens} tokens")
            print(f"{one.folder}\t" + "\t".join((*facts, f"{one.bytes / 1e6:,.1f} MB", f"used {used}")))
    elif given.command == "show":
        manifest = read_manifest(given.folder)
        print(json.dumps(asdict(manifest), indent=1))
    elif given.command == "remove":
        for folder in given.folders:
            remove(folder)
            print(f"removed {folder}")
    else:
        for one in prune(given.root, parse_bytes(given.keep_bytes)):
            print(f"removed {one.folder}\t{one.bytes / 1e6:,.1f} MB")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on standard error."""
    try:
        run(argv)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
