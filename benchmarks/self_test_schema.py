"""Writes the JSON schema of self-test reports from the model that reads them: python -m benchmarks.self_test_schema."""

from __future__ import annotations

import json
from pathlib import Path

from qlora_trainer.run import self_test
from qlora_trainer.run.self_test.report import SCHEMA_FILE, Report


def main() -> None:
    """Write it where it is shipped from."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema()}
    path = Path(self_test.__path__[0]) / SCHEMA_FILE
    path.write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
