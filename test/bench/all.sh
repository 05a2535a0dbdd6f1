#!/usr/bin/env bash
# All comparisons with the peers that are installed, one after the other.
cd "$(dirname "$0")" || exit 1
status=0
for s in oci docker-run memory lives pull image-copy; do
  echo "=== $s"
  ./$s.sh || status=1
done
exit $status
