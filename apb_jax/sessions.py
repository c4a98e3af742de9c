"""``python -m apb_jax.sessions``: list, show, remove and prune the sessions that were saved to disk."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from dataclasses import asdict

from apb_jax.arguments import size
from apb_jax.command import Parser, command


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m apb_jax.sessions``."""
    parser = Parser(prog="python -m apb_jax.sessions", description="Sessions that were saved to disk.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    one = commands.add_parser("list", help="the sessions in a folder, the one used longest ago first")
    one.add_argument("root", metavar="DIR")
    one = commands.add_parser("show", help="what made a session, as JSON; its files against their sizes")
    one.add_argument("folder", metavar="SESSION")
    one = commands.add_parser("remove", help="remove sessions")
    one.add_argument("folders", nargs="+", metavar="SESSION")
    one = commands.add_parser("prune", help="remove the sessions used longest ago, and what was left unfinished")
    one.add_argument("root", metavar="DIR")
    one.add_argument("--keep-bytes", type=size(0), required=True, metavar="N", help="bytes that may stay: 0, 500M, 50G")
    return parser


@command("python -m apb_jax.sessions")
def main(argv: list[str]) -> None:
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
        for one in prune(given.root, given.keep_bytes):
            print(f"removed {one.folder}\t{one.bytes / 1e6:,.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
