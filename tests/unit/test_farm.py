"""A farm trains its members as they would be trained alone, and as a plain loop would."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.evaluation.batches import training_batch
from sidecast.evaluation.corpora import Corpus
from sidecast.evaluation.farm import GroupRun
from sidecast.evaluation.gradients import Engine
from sidecast.evaluation.models.model import views
from sidecast.evaluation.settings import MemberSettings
from sidecast.evaluation.tasks import DataChange
from tests.support.farm_runs import TASK, corpus, member, one_thread, train


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


PUSH = {"start_step": 10, "interval_steps": 4, "late_steps": 2, "time_constant_steps": 12.0}
JUMPS = {"predictor": "linear", "period_steps": 10, "late_steps": 1, "max_relative_norm": 5.0}
PREDICTED = {"start_step": 10, "interval_steps": 3, "late_steps": 1, "context_len": 3}
MEMBERS = [
    member(lr=1e-2),
    member(lr=3e-3, b1=0.8),
    member(method="push", options=PUSH),
    member(method="outer-nesterov", options={"interval_steps": 5}),
    member(method="jump", options=JUMPS),
    member(method="predicted-push", options=PREDICTED),
]


def _plain_loop(settings: MemberSettings) -> tuple[torch.Tensor, list[float]]:
    """The loop that everybody writes."""
    model = TASK.model.build()
    data = corpus()
    parameters = {
        name: torch.nn.Parameter(view[0].clone()) for name, view in views(model, model.initial(0)[None]).items()
    }
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=settings.optimizer.lr,
        betas=(settings.optimizer.b1, settings.optimizer.b2),
        weight_decay=settings.optimizer.weight_decay,
    )
    losses = []
    for step in range(settings.num_steps):
        optimizer.param_groups[0]["lr"] = settings.optimizer.lr * settings.schedule.ratio(step, settings.num_steps)
        tokens, targets = training_batch(data.train_tokens, 0, step, TASK.batch_size, TASK.sequence_length)
        loss = model.losses({name: each[None] for name, each in parameters.items()}, tokens, targets)[0]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings.optimizer.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return torch.cat([each.detach().flatten() for each in parameters.values()]), losses


@pytest.mark.parametrize("settings", MEMBERS[:2])
def test_one_member_equals_a_plain_loop(settings: MemberSettings) -> None:
    expected_P, losses = _plain_loop(settings)
    assert losses[-1] < losses[0] - 0.5
    torch.testing.assert_close(train([settings]).params_MP[0], expected_P, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tile_members", [1, 2, None])
def test_a_member_equals_the_same_run_alone(tile_members: int | None) -> None:
    together = train(MEMBERS, tile_members=tile_members)
    for row, settings in enumerate(MEMBERS):
        alone = train([settings])
        torch.testing.assert_close(together.params_MP[row], alone.params_MP[0], rtol=0, atol=2e-5)
        if tile_members != 2:
            assert torch.equal(together.params_MP[row], alone.params_MP[0])


def test_tiles_of_sequences_change_round_off_only() -> None:
    whole, tiled = train(MEMBERS[:2]), train(MEMBERS[:2], tile_sequences=3)
    torch.testing.assert_close(tiled.params_MP, whole.params_MP, rtol=0, atol=2e-5)


def test_a_run_goes_on_from_its_state_bit_for_bit() -> None:
    whole = train(MEMBERS)
    first = GroupRun(TASK, [corpus()], MEMBERS, Engine())
    first.advance(13)
    second = GroupRun(TASK, [corpus()], MEMBERS, Engine())
    second.load(first.state())
    second.advance(30)
    assert torch.equal(second.params_MP, whole.params_MP)
    assert [result.final_losses for result in second.results()] == [result.final_losses for result in whole.results()]


def test_a_change_of_the_text_begins_with_its_step_and_is_what_is_validated_then() -> None:
    change = replace(TASK, change=DataChange(corpus="another", step=13))
    other = Corpus(corpus().train_tokens.flip(0), corpus().validation_tokens.flip(0), "made up")
    plain, changed = (GroupRun(task, [corpus(), other], [member()], Engine()) for task in (TASK, change))
    for run in (plain, changed):
        run.advance(13)
    assert torch.equal(changed.params_MP, plain.params_MP)
    for run in (plain, changed):
        run.advance(1)
    assert not torch.equal(changed.params_MP, plain.params_MP)
    for run in (plain, changed):
        run.advance(30)
    losses = changed.results()[0].final_losses["raw"], plain.results()[0].final_losses["raw"]
    # The plain run's weights know nothing of the other text; what was trained on it is at home there.
    assert losses[0] < _loss_on(other, plain) - 0.01
    assert math.isclose(losses[0], _loss_on(other, changed), rel_tol=1e-6)


def _loss_on(text: Corpus, run: GroupRun) -> float:
    judged = GroupRun(TASK, [text], [member(num_steps=5, schedule="constant", lr=1e-30)], Engine())
    judged.params_MP.copy_(run.params_MP)
    judged.advance(5)
    return judged.results()[0].final_losses["raw"]


def test_pushes_with_a_gain_of_zero_change_no_bit() -> None:
    plain, pushed = train([member(), member(method="push", options={**PUSH, "gain": 0.0})]).params_MP
    assert torch.equal(plain, pushed)


def test_methods_do_something_and_say_what() -> None:
    results = train(MEMBERS).results()
    assert len({result.final_losses["raw"] for result in results}) == len(MEMBERS)
    # Snapshots at 12, 16, 20, 24 and 28, after which the last is 2 steps late: at 30.
    assert results[2].method["num_pushes"] == 5
    # From windows that end at 10 and 20; the one that ends at 30 is not applied any more.
    assert results[4].method == {"num_jumps": 2, "num_dropped": 0}
    # From snapshots at 12, 15, ..., 27; the one at 30 would be applied at 31.
    assert results[5].method["num_pushes"] == 6
    assert all(len(result.curve) == 10 and math.isfinite(result.worst_spike) for result in results)


def test_a_diverged_member_harms_nobody_else() -> None:
    good, bad = train([member(), member(lr=1e18)]).results()
    assert good.final_losses == train([member()]).results()[0].final_losses
    assert bad.final_losses["raw"] == math.inf
    assert bad.worst_spike == math.inf


@pytest.mark.parametrize("optimizer", ["schedule-free", "ademamix", "muon", "lookahead"])
def test_optimizers_of_libraries(optimizer: str) -> None:
    pytest.importorskip("schedulefree")
    pytest.importorskip("pytorch_optimizer")
    settings = [member(optimizer=optimizer, schedule="constant", lr=lr) for lr in (2e-2, 6e-3)]
    whole = train(settings)
    assert all(result.final_losses["raw"] < 5.4 for result in whole.results())
    assert torch.equal(train(settings[1:]).params_MP[0], whole.params_MP[1])
    first = GroupRun(TASK, [corpus()], settings, Engine())
    first.advance(13)
    second = GroupRun(TASK, [corpus()], settings, Engine())
    second.load(first.state())
    second.advance(30)
    torch.testing.assert_close(second.params_MP, whole.params_MP, rtol=0, atol=1e-6)


def test_schedule_free_equals_the_librarys_own_loop() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    settings = member(optimizer="schedule-free", schedule="constant")
    model, data = TASK.model.build(), corpus()
    parameter = torch.nn.Parameter(model.initial(0))
    optimizer = schedulefree.AdamWScheduleFree(
        [parameter], lr=settings.optimizer.lr, betas=(0.9, 0.95), weight_decay=0.1, foreach=False
    )
    optimizer.train()
    for step in range(settings.num_steps):
        optimizer.param_groups[0]["lr"] = settings.optimizer.lr * settings.schedule.ratio(step, settings.num_steps)
        tokens, targets = training_batch(data.train_tokens, 0, step, TASK.batch_size, TASK.sequence_length)
        optimizer.zero_grad()
        model.losses(views(model, parameter[None]), tokens, targets)[0].backward()
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()
    optimizer.eval()
    run = train([settings])
    torch.testing.assert_close(run._optimizer.read_out(run.params_MP)[0], parameter.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "pull"}, "method is 'pull'; allowed: none, push, predicted-push, jump, outer-nesterov"),
        ({"method": "push", "options": {"gian": 1}}, "method 'push' has no option 'gian'; allowed: interval_steps"),
        ({"method": "push", "options": {"gain": -1}}, "push.gain is -1; it must be at least 0"),
        ({"method": "jump", "options": {"predictor": "liner"}}, "predictor is 'liner'; allowed: "),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; allowed: adamw, "),
    ],
)
def test_refusals(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        train([member(**settings)])
