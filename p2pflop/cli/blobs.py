"""``p2pflop put``, ``get``, ``ls`` and ``rm``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2pflop.cli.output import Flags, common_options, print_json, print_table, say
from p2pflop.errors import ConfigError
from p2pflop.ids import parse_hash
from p2pflop.units import format_bytes, parse_duration

if TYPE_CHECKING:
    from p2pflop.client import BlobStat


@click.command("put")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--public", is_flag=True, help="Announce it, and serve it to anyone.")
@common_options
@click.pass_obj
def put_command(flags: Flags, path: Path, public: bool) -> None:
    """Keep a file as a blob.

    Prints the blob's address. Without --public only this node's own user can read it.

    \b
    Examples:
      p2pflop put weights.safetensors
      p2pflop put --public data.npy
      cat data.npy | p2pflop put -
    """
    source = sys.stdin.buffer.read() if str(path) == "-" else path
    if isinstance(source, Path) and not source.is_file():
        raise ConfigError(f"{path} is not a file")
    from p2pflop.cli.progress import byte_bar

    with byte_bar("storing", source.stat().st_size if isinstance(source, Path) else None) as tell:
        blob = flags.client(start=True).put(source, public=public, progress=tell)
    if flags.json:
        print_json(_described(blob))
        return
    click.echo(blob.address.hex())
    say(f"{format_bytes(blob.size_bytes)}, {'public' if blob.public else 'private'}")


@click.command("get")
@click.argument("hash_", metavar="HASH")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write here [default: HASH].")
@click.option("--timeout", metavar="TIME", help="Search for this long [default: 30s].")
@common_options
@click.pass_obj
def get_command(flags: Flags, hash_: str, out: Path | None, timeout: str | None) -> None:
    """Fetch a blob by its hash.

    It is looked for on this node, then among peers; every byte is verified. '-o -' writes to
    standard output.

    \b
    Examples:
      p2pflop get 3f1c... -o weights.safetensors
      p2pflop get p2pflop://3f1c... -o - | tar x
    """
    address = parse_hash(hash_)
    timeout_s = None if timeout is None else parse_duration(timeout) / 10**9
    client = flags.client(start=True)
    if out is not None and str(out) == "-":
        sys.stdout.buffer.write(client.get(address, timeout_s=timeout_s))
        sys.stdout.buffer.flush()
        return
    target = out or Path(address.hex())
    from p2pflop.cli.progress import byte_bar

    with byte_bar("fetching") as tell:
        size_bytes = client.download(address, target, timeout_s=timeout_s, progress=tell)
    if flags.json:
        print_json({"address": address.hex(), "size_bytes": size_bytes, "path": str(target)})
    else:
        click.echo(str(target))
        say(f"{format_bytes(size_bytes)}, verified")


@click.command("ls")
@common_options
@click.pass_obj
def ls_command(flags: Flags) -> None:
    """List the blobs of this node.

    \b
    Examples:
      p2pflop ls
      p2pflop ls --json | jq -r '.[] | select(.public) | .address'
    """
    blobs = flags.client(start=True).blobs()
    if flags.json:
        print_json([_described(blob) for blob in blobs])
        return
    rows = (
        (blob.address.hex(), format_bytes(blob.size_bytes), "public" if blob.public else "private")
        for blob in blobs
    )
    print_table(("ADDRESS", "SIZE", ""), rows, "This node keeps no blob yet: p2pflop put PATH")


@click.command("rm")
@click.argument("hashes", metavar="HASH...", nargs=-1, required=True)
@common_options
@click.pass_obj
def rm_command(flags: Flags, hashes: tuple[str, ...]) -> None:
    """Delete blobs from this node.

    They are gone at once; others may have copies of public ones. Inputs of a run under way stay
    until it is over. Blobs that are here for a buyer's lease are not yours to delete: the node does
    so itself, an hour after the lease.

    \b
    Examples:
      p2pflop rm 3f1c...
      p2pflop ls --json | jq -r '.[].address' | xargs p2pflop rm
    """
    addresses = [parse_hash(text) for text in hashes]
    client = flags.client(start=True)
    for address in dict.fromkeys(addresses):
        blob = client.delete(address)
        if flags.json:
            print_json(_described(blob))
        else:
            say(f"{address.hex()} is deleted, {format_bytes(blob.size_bytes)}")


def _described(blob: BlobStat) -> dict[str, Any]:
    return {"address": blob.address.hex(), "size_bytes": blob.size_bytes, "public": blob.public}
