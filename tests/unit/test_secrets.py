"""Files that hold secrets, on both sides: what is wrong with them is said before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecast.commands.__main__ import main
from sidecast.errors import ConfigError
from sidecast.nowcaster_service.config import read_token
from sidecast.trainer.hook.config import parse_section


def test_a_token_is_read_without_the_line_end(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("5ecret\n")
    assert read_token("--token-file", file) == "5ecret"


@pytest.mark.parametrize("text", ["", "\n", "two\nlines", "geheimniß"])
def test_a_token_that_cannot_be_sent_or_that_everybody_knows_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"--token-file .*token holds no token; allowed: one line"):
        read_token("--token-file", file)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["status", "--token-file", "{missing}"], "--token-file {missing} cannot be read: No such file or directory"),
        (["status", "--tls-ca", "{missing}"], "--tls-ca {missing} cannot be read: No such file or directory"),
        (["serve", "--token-file", "{missing}"], "--token-file {missing} cannot be read: No such file or directory"),
        (
            ["serve", "--tls-cert", "{missing}", "--tls-key", "{missing}"],
            "--tls-cert {missing} cannot be read: No such file or directory",
        ),
    ],
)
def test_a_missing_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    missing = tmp_path / "missing"
    assert main([argument.format(missing=missing) for argument in arguments]) == 2
    assert capsys.readouterr().err == f"sidecast: {complaint.format(missing=missing)}\n"


@pytest.mark.parametrize("key", ["token_file", "tls_ca"])
def test_the_trainer_names_a_missing_file(tmp_path: Path, key: str) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(ConfigError, match=rf"nowcaster\.{key} is '{missing}'; allowed: an existing file"):
        parse_section({key: missing})
