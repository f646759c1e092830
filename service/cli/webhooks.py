"""Commands about webhooks: addresses that are told when a job moves."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from service.cli import talk
from service.cli.frame import Json, Url, Yes, command, confirm, connected, group
from service.schemas import Delivery

webhooks_app = group(
    __name__, "webhooks", "Addresses that are told when a job moves: list, add, deliveries, test, remove."
)

WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="A webhook's id.")]


@command("list", of=webhooks_app)
def list_webhooks(url: Url = None, json_: Json = False) -> None:
    """List webhooks."""
    with connected(url) as client:
        found = client.webhooks()
    if json_:
        talk.put_json_list(found)
        return
    rows = ((each.id, each.url, " ".join(each.types), "" if each.disabled_at is None else "disabled") for each in found)
    talk.put_rows(("id", "url", "types", ""), rows)


@command("add", of=webhooks_app)
def add_webhook(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The https address to tell.")],
    type_: Annotated[
        list[str] | None,
        typer.Option("--type", help="What it is told, like job.running; may be repeated (the ends of jobs)."),
    ] = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Add a webhook, and print the secret that signs its messages: nothing shows it again."""
    with connected(url) as client:
        made = client.add_webhook({"url": target, **({"types": type_} if type_ else {})})
    if json_:
        talk.put_json(made)
        return
    talk.say(f"{made.id} is told of {', '.join(made.types)}; its secret:")
    talk.put(made.secret or "")


@command("deliveries", of=webhooks_app)
def deliveries(
    webhook: WebhookId,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    url: Url = None,
    json_: Json = False,
) -> None:
    """List the messages to a webhook, newest first, and what became of them."""
    with connected(url) as client:
        found = list(islice(client.deliveries(webhook), limit))
    talk.put_json_list(found) if json_ else _put_deliveries(found)


@command("test", of=webhooks_app)
def test_webhook(webhook: WebhookId, url: Url = None, json_: Json = False) -> None:
    """Have a message sent now; `webhooks deliveries` says what became of it."""
    with connected(url) as client:
        sent = client.test_webhook(webhook)
    talk.put_json(sent) if json_ else _put_deliveries([sent])


@command("remove", of=webhooks_app)
def remove_webhook(webhook: WebhookId, yes: Yes = False, url: Url = None, json_: Json = False) -> None:
    """Take a webhook away, with its messages."""
    confirm(f"Remove {webhook}? It is told nothing more.", yes=yes)
    with connected(url) as client:
        gone = client.remove_webhook(webhook)
    talk.put_json(gone) if json_ else talk.put(f"{gone.id}  removed")


def _put_deliveries(found: list[Delivery]) -> None:
    rows = (
        (each.id, each.type, each.state, each.tries, talk.moment(each.created_at), each.last_error) for each in found
    )
    talk.put_rows(("id", "type", "state", "tries", "made", "last error"), rows)
