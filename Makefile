# SPDX-License-Identifier: MIT
PYTHON ?= python3
PORT ?= 8443
VENV ?= .venv
CERT = certs/localhost.pem
KEY = certs/localhost-key.pem
PYTEST = $(VENV)/bin/python -m pytest -q -rs test_receiver.py

help:  ## show this
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## */:/' | awk -F: '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo "Variables: PYTHON=$(PYTHON) PORT=$(PORT)"

run: certs  ## start the receiver on PORT; first make a certificate if there is none
	@exec $(PYTHON) receiver.py --port $(PORT)

# Two processes run the tests, because many tests only wait. The two expressions select each test
# once; the word in them only makes the two shares about equal.
test: certs $(VENV)/made  ## run all tests, in a virtual environment
	@$(PYTEST) -k "in" >$(VENV)/half.log 2>&1 & half=$$!; trap 'kill $$half 2>/dev/null' EXIT; \
	$(PYTEST) -k "not in"; status=$$?; \
	wait $$half || status=1; cat $(VENV)/half.log; exit $$status

certs:  ## make a self-signed certificate for localhost, unless there is a valid one
	@if openssl x509 -checkend 86400 -noout -in $(CERT) >/dev/null 2>&1 && test -s $(KEY); then exit 0; fi; \
	command -v openssl >/dev/null || { echo "openssl is missing: install it, it makes the certificate" >&2; exit 1; }; \
	mkdir -p certs && umask 077 && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 \
	  -subj /CN=localhost -addext "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1" \
	  -keyout $(KEY) -out $(CERT) 2>certs/openssl.log || { cat certs/openssl.log >&2; exit 1; }; \
	rm -f certs/openssl.log; chmod 644 $(CERT); echo "Made $(CERT), valid for a year, for localhost, 127.0.0.1 and ::1"

send:  ## post every sample call to the receiver that runs on PORT
	@command -v curl >/dev/null || { echo "curl is missing: install it, it sends the calls" >&2; exit 1; }
	@for call in identify track page group; do \
	  reply=$$(curl -sS --cacert $(CERT) -u segment: https://localhost:$(PORT)/ \
	    -H 'Content-Type: application/json' -d @fixtures/$$call.json -w ' %{http_code}') || \
	    { echo 'Is the receiver running? Start it with "make run PORT=$(PORT)".' >&2; exit 1; }; \
	  printf '%-8s%s\n' $$call "$$reply"; \
	done

conformance: $(VENV)/made  ## test the endpoint at the URL ENDPOINT with the key API_KEY; see README.md
	@$(VENV)/bin/python -m pytest -q -rN --tb=short -p no:cacheprovider -m conformance test_receiver.py

bench:  ## measure calls per second with h2load, without and with storage
	@command -v h2load >/dev/null || { echo "h2load is missing: install nghttp2-client, it makes the load" >&2; exit 1; }
	@$(MAKE) -s certs && PYTHON="$(PYTHON)" CERT="$(CERT)" sh -c "$$BENCH"

clean:  ## remove the virtual environment, the certificate and caches, but no calls or API keys
	rm -rf $(VENV) $(CERT) $(KEY) __pycache__ .pytest_cache

$(VENV)/made: Makefile
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check pytest==9.2.0 requests==2.34.2
	@touch $@

.PHONY: help run test certs send conformance bench clean

# Each line of the table is a receiver on core 0, if there are two, and h2load on the other: a
# warm-up of 1 second, and 3 seconds that count. The sample call has no message_id, so that every
# call is a new one.
define BENCH
scratch=$$(mktemp -d)
trap 'kill $$pid 2>/dev/null; rm -rf "$$scratch"' EXIT
trap 'exit 130' INT TERM

on_core() {
  core=$$1; shift
  if taskset -c 1 true 2>/dev/null; then exec taskset -c $$core "$$@"; else exec "$$@"; fi
}

load() {
  (on_core 1 h2load --h1 -c "$$1" -D "$$2" -d "$$scratch/call.json" \
    -H "Content-Type: application/json" -H "Authorization: Basic c2VnbWVudDo=" \
    --log-file="$$scratch/times" "$$url") >"$$scratch/load" 2>&1 || cat "$$scratch/load" >&2
}

sed '/"message_id"/d' fixtures/track.json >"$$scratch/call.json"
cat >"$$scratch/nothing.py" <<END
import receiver


class Nothing(receiver.Destination):
    def track(self, user_id, event, properties, call):
        pass


receiver.main(Nothing())
END

printf '%-9s %11s %9s %8s %8s %10s\n' storage connections calls/s "p50 ms" "p99 ms" "memory MB"
for storage in none SQLite; do
  for connections in 16 64; do
    rm -f "$$scratch"/calls.db* "$$scratch/said"
    program="$$scratch/nothing.py"
    [ $$storage = none ] || program="receiver.py --database $$scratch/calls.db"
    (PYTHONPATH="$$PWD" on_core 0 $$PYTHON $$program --port 0 --quiet) \
      >"$$scratch/said" 2>"$$scratch/log" & pid=$$!
    until grep -q Listening "$$scratch/said"; do
      kill -0 $$pid 2>/dev/null || { cat "$$scratch/log" >&2; exit 1; }
      sleep 0.1
    done
    url=$$(sed 's/^Listening on //' "$$scratch/said")
    load $$connections 1; rm "$$scratch/times"; load $$connections 3
    memory=$$(ps -o rss= -p $$pid); kill $$pid; wait $$pid
    cut -f2,3 "$$scratch/times" | sort -n -k2 |
      awk -v storage=$$storage -v connections=$$connections -v kb=$$memory '
        $$1 != 200 {bad++}
        {times[NR] = $$2}
        END {
          printf "%-9s %11d %9d %8.1f %8.1f %10d\n", storage, connections, NR / 3,
            times[int(NR / 2) + 1] / 1000, times[int(NR * 0.99) + 1] / 1000, kb / 1024
          if (bad || !NR) {print bad + 0, "of", NR + 0, "calls were not answered 200"; exit 1}
        }' || exit 1
  done
done
endef
export BENCH
