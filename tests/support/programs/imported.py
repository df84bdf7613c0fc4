"""Imports what the programs of tests need, once, before they are forked."""

from tests.support.programs.forking import be_quiet

be_quiet()

import deepspeed  # noqa: E402, F401
import transformers  # noqa: E402, F401

import tests.support.services.harness  # noqa: E402, F401
