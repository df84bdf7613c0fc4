"""Read-outs as messages of the wire."""

from __future__ import annotations

import json

from sidecast.nowcaster_service.probing.losses import ProbeLosses
from sidecast.nowcaster_service.read_outs.averages import Average
from sidecast.nowcaster_service.session import Session
from sidecast.protos import nowcast_pb2 as pb


def read_out_statuses(session: Session) -> list[pb.ReadOutStatus]:
    """All read-outs of a run, in its order."""
    averages, probe = session.read_outs.averages, session.read_outs.probe
    return [_status(item.name, averages.get(item.name), probe) for item in session.settings.read_outs]


def probe_status(session: Session) -> pb.ProbeStatus | None:
    """What the probe has said of a run; None if there is nothing to evaluate, or nothing to do so with."""
    settings, probe = session.settings, session.read_outs.probe
    if not (settings.probe or settings.probe_fault):
        return None
    return pb.ProbeStatus(
        points=[pb.ProbePoint(step=point.step, losses=point.losses) for point in probe.points],
        best=probe.points[-1].best if probe.points else "",
        fault=probe.fault,
    )


def description(name: str, average: Average, session: Session) -> pb.ReadOutDescription:
    """What a read-out is, before its bytes."""
    manifest = session.settings.manifest
    return pb.ReadOutDescription(
        status=_status(name, average, session.read_outs.probe),
        digest=average.digest,
        manifest=pb.Manifest(
            parameters=[pb.Parameter(fqn=spec.fqn, shape=spec.shape) for spec in manifest.parameters],
            config_json=json.dumps(dict(manifest.config)),
            aliases=manifest.aliases,
        ),
    )


def _status(name: str, average: Average | None, probe: ProbeLosses) -> pb.ReadOutStatus:
    if average is None:
        return pb.ReadOutStatus(name=name)
    return pb.ReadOutStatus(
        name=name,
        step=average.step,
        begin_step=average.begin_step,
        num_snapshots=average.num_snapshots,
        probe_loss=probe.at(average.step, name),
    )
