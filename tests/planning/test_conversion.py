"""What a conversion on EC2 is projected to take."""

import pytest

from rn50.planning import conversion, costs

ORIGINS = ("hf", "kaggle", "links", "s3")


@pytest.fixture(scope="module")
def table():
    return costs.read_table()


@pytest.mark.parametrize("origin", ORIGINS)
def test_hours_fall_with_cores_and_have_the_origins_range(table, origin):
    some, many = (conversion.hours(table, vcpus, origin, 144) for vcpus in (8, 32))
    assert some[1] < some[0] < some[2]
    assert many[0] < some[0]
    # only the encoding is shared among cores: 1,331,167 images at 142 a second of one
    saved = 1_331_167 / 142 * (1 / 4 - 1 / 16) / 3600
    assert some[0] - many[0] == pytest.approx(saved, rel=1e-9)
    row = table.constant[f"{origin}_mb_per_s"]
    assert some[2] - some[1] == pytest.approx(144_000 * (1 / row["low"] - 1 / row["high"]) / 3600)


def test_a_disk_has_room_for_what_is_unpacked_and_for_the_betons(table):
    written = conversion.written_gb(table)
    assert 120 < written < 145
    assert conversion.disk_gb(table, "links", 144) == 144 + written
    assert conversion.disk_gb(table, "hf", 144) == 288 + written  # shards and what is unpacked of them, at once
    assert conversion.disk_gb(table, "kaggle", 155) == 310  # the archive goes before the betons come


@pytest.mark.parametrize("origin", ORIGINS)
def test_the_cheapest_that_holds_it_comes_first(table, origin):
    found = conversion.offers(table, origin)
    assert [dollars for dollars, _, _ in found] == sorted(dollars for dollars, _, _ in found)
    for dollars, hours, row in found:
        assert dollars == pytest.approx(hours[0] * row["value"])
        needed = conversion.disk_gb(table, origin, table.value("source_gb"))
        assert row["disk_gb"] * conversion.DISK_SHARE >= needed
    smallest = found[0][2]["name"]
    assert smallest == ("c6id.4xlarge" if origin == "hf" else "c6id.2xlarge")
