#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asks an endpoint again and again, and tells how many requests were lost while something happened to its hosts.

    tests/benchmarks/lost_requests.py BASE_URL API_KEY_FILE MODEL SECONDS [AFTER]

Ends after SECONDS, or earlier when it was answered for AFTER seconds after a loss. Prints one JSON object: requests answered,
lost by kind, those whose text differed from the first answer, and the seconds from the first lost one to the next answered one.
"""

import collections
import json
import sys
import time
import urllib.error
import urllib.request


def main() -> None:
    base, key_file, model, seconds, *after = sys.argv[1:]
    with open(key_file, encoding="ascii") as handle:  # noqa: PTH123 - runs with any host's Python
        key = handle.read().strip()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    body = json.dumps({"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    answered, different, lost = 0, 0, collections.Counter()  # type: ignore[var-annotated]
    first, gone, outage, back = "", 0.0, 0.0, 0.0
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end and not (after and back and time.monotonic() - back > float(after[0])):
        try:
            request = urllib.request.Request(f"{base}/completions", body.encode(), headers)
            text = json.loads(opener.open(request, timeout=60).read())["choices"][0]["text"]
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            lost[f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(reason).__name__] += 1
            gone, back = gone or time.monotonic(), 0.0
            time.sleep(0.5)
            continue
        if gone:
            back = time.monotonic()
            outage, gone = max(outage, back - gone), 0.0
        answered += 1
        first = first or text
        different += text != first
    print(json.dumps({"answered": answered, "lost": lost, "different": different, "outage_s": round(outage, 1)}))


if __name__ == "__main__":
    main()
