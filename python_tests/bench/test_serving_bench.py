"""`python -m idcore.bench serving`."""

import json

from idcore.bench.main import main


def test_report(capsys):
    assert main(["serving", "--batch", "1,3", "--requests", "3", "--steps", "1", "--rounds", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in report["rows"]] == [1, 3] and report["requests"] == 3
    assert all(row["parity"] and row["pictures_per_s"] > 0 and row["p50_ms"] <= row["p90_ms"] for row in report["rows"])
