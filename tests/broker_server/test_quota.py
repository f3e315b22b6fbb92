"""Token buckets of those who ask for certificates, on a clock that the test turns by hand."""

from broker_server.quota import Quota


def test_a_user_may_ask_a_few_times_at_once_and_then_now_and_then():
    quota = Quota(burst=5.0, rate=1.0)
    assert [quota.takes("pi-7", 0.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert [quota.takes("pi-7", 2.0) for _ in range(3)] == [True] * 2 + [False]
    assert quota.takes("pi-8", 2.0)


def test_claims_share_what_they_may_ask_and_devices_that_renew_do_not_wait_for_them():
    quota = Quota(burst=5.0, rate=1.0, all_burst=50.0, all_rate=10.0)
    assert sum(quota.takes(f"@claim-{number:08x}", 0.0) for number in range(1000)) == 50
    assert quota.takes("pi-7", 0.0)
    assert sum(quota.takes(f"@claim-{number:08x}", 1.0) for number in range(1000)) == 10


def test_names_of_devices_that_are_made_up_get_no_more_together_and_claims_do_not_wait_for_them():
    quota = Quota(burst=5.0, rate=1.0, all_burst=50.0, all_rate=10.0)
    assert sum(quota.takes(f"pi-{number}", 0.0) for number in range(1000)) == 50
    assert quota.takes("@claim-00000001", 0.0)
    assert sum(quota.takes(f"pi-{number}", 1.0) for number in range(1000, 2000)) == 10


def test_users_that_are_made_up_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("broker_server.quota._USERS", 100)
    quota = Quota()
    for number in range(1000):
        quota.takes(f"x{number}", 0.0)
    assert len(quota._users) == 100
