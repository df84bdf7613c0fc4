"""Read-outs as messages of the wire."""

from __future__ import annotations

import json

from sidecast.nowcaster_service.probing.best import Best
from sidecast.nowcaster_service.probing.losses import ProbeLosses
from sidecast.nowcaster_service.read_outs.average import Average
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
        kept=[_kept_status(item) for item in probe.best.items],
    )


def description(name: str, average: Average, session: Session) -> pb.ReadOutDescription:
    """What a read-out is, before its bytes."""
    manifest, probe = session.settings.manifest, session.read_outs.probe
    kept = probe.best.find(name)
    return pb.ReadOutDescription(
        status=_status(name, average, probe) if kept is None else _kept_status(kept),
        digest=average.digest,
        manifest=pb.Manifest(
            parameters=[pb.Parameter(fqn=spec.fqn, shape=spec.shape) for spec in manifest.parameters],
            config_json=json.dumps(dict(manifest.config)),
            aliases=manifest.aliases,
        ),
    )


def _kept_status(item: Best) -> pb.ReadOutStatus:
    status = pb.ReadOutStatus(
        name=item.name,
        step=item.average.step,
        begin_step=item.average.begin_step,
        num_snapshots=item.average.num_snapshots,
    )
    status.probe_loss = item.loss
    return status


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
