"""Read-outs as messages of the wire."""

from __future__ import annotations

import json

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.read_outs.averages import Average
from sidecast.nowcaster_service.session import Session
from sidecast.protos import nowcast_pb2 as pb


def read_out_statuses(session: Session) -> list[pb.ReadOutStatus]:
    """All read-outs of a run, in its order."""
    averages = session.read_outs.averages
    return [_status(item.name, averages.get(item.name)) for item in session.settings.read_outs]


def description(name: str, average: Average, manifest: ModelManifest) -> pb.ReadOutDescription:
    """What a read-out is, before its bytes."""
    return pb.ReadOutDescription(
        status=_status(name, average),
        digest=average.digest,
        manifest=pb.Manifest(
            parameters=[pb.Parameter(fqn=spec.fqn, shape=spec.shape) for spec in manifest.parameters],
            config_json=json.dumps(dict(manifest.config)),
            aliases=manifest.aliases,
        ),
    )


def _status(name: str, average: Average | None) -> pb.ReadOutStatus:
    if average is None:
        return pb.ReadOutStatus(name=name)
    return pb.ReadOutStatus(
        name=name, step=average.step, begin_step=average.begin_step, num_snapshots=average.num_snapshots
    )
