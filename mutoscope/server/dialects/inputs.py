"""Pictures and clips that a body names by URL or data URI: checked before the transaction, kept in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mutoscope.jobs import addresses, assets, inline
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import InvalidRequest
from mutoscope.jobs.inline import Inline, InputKind
from mutoscope.jobs.spec import Media
from mutoscope.settings import Settings


@dataclass(frozen=True)
class Named:
    """A file of a body: the field, its URI, and what it has to be."""

    field: str
    uri: str
    kind: InputKind


def look(named: Iterable[Named], settings: Settings) -> dict[str, Inline]:
    """Check all URIs, and open those that hold their data. Starts processes: not to be called in a transaction.

    Raises:
        InvalidRequest: a URL that may not be fetched, or data that is not a usable picture or clip.
    """
    found: dict[str, Inline] = {}
    policy = addresses.input_policy(settings)
    for one in named:
        if inline.is_data_uri(one.uri):
            if one.uri not in found:
                found[one.uri] = inline.decode(one.uri, kinds=(one.kind,), field=one.field)
            continue
        try:
            addresses.parse(one.uri, policy)
        except addresses.Refused as e:
            raise InvalidRequest(f"{one.field}: the URL {e.reason}.", field=one.field) from e
    return found


def keep(
    tx: Tx, account_id: str, named: Iterable[Named], found: Mapping[str, Inline], settings: Settings
) -> dict[str, Media]:
    """What stands in the spec for each URI; data become assets."""
    files: dict[str, Media] = {}
    for one in named:
        if one.uri in files:
            continue
        if one.uri in found:
            files[one.uri] = assets.store(
                tx, account_id, found[one.uri], data_dir=settings.data_dir, hours=settings.upload_hours
            )
        else:
            files[one.uri] = Media(url=one.uri)
    return files
