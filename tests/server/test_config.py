from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdp.server.config import Config, load, parse
from cdp.server.errors import ConfigInvalid

SAMPLE = Path(__file__).parents[2] / "deploy" / "server.toml"


def test_the_sample_shows_every_key_with_its_default() -> None:
    assert load(SAMPLE) == Config()
    assert tomllib.loads(SAMPLE.read_text()) == msgspec.json.decode(msgspec.json.encode(Config()))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot = 1", "prot"),
        ("[tls]\nname = []", "name"),
        ("port = 70000", "port"),
        ("port = 'x'", "port"),
        ("directory = 'relative'", "directory"),
        ("url = 'http://x'", "url"),
        ("listen = ['nowhere']", "nowhere"),
        ("log_level = 'loud'", "log_level"),
        ("[limits]\ningest_bytes_max = 5", "ingest_bytes_max"),
        ("token_lifetime_s = 0", "token_lifetime_s"),
        ("[[[", "TOML"),
    ],
)
def test_what_is_wrong_is_named(text: str, named: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse(text, "server.toml")
    assert named in caught.value.sentence
    assert caught.value.remedy


def test_a_missing_file_is_an_error_if_it_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid):
        load(tmp_path / "none.toml")


@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_a_typed_error(text: str) -> None:
    try:
        parse(text, "fuzz")
    except ConfigInvalid as error:
        assert error.remedy


def test_names_are_those_that_are_dialled() -> None:
    config = Config(url="https://backup.example.com:7443", listen=("10.0.0.2", "::"))
    assert config.names[:2] == ("backup.example.com", "10.0.0.2")
    assert {"localhost", "127.0.0.1", "::1"} <= set(config.names)
    assert "::" not in config.names
    assert Config(listen=("fd00::2",)).public_url == "https://[fd00::2]:7443"
