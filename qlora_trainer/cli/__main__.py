"""`python -m qlora_trainer.cli`, the command without an installed entry point."""

from __future__ import annotations

import sys

from qlora_trainer.cli.app import main

sys.exit(main())
