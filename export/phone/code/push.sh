#!/bin/sh
# Copies the model to a phone by adb, to where debug builds may read it: ./push.sh [SERIAL]
set -eu
cd "$(dirname "$0")"
command -v adb > /dev/null || { echo "push.sh: adb is not installed (Android SDK platform-tools)" >&2; exit 2; }
[ $# = 0 ] || export ANDROID_SERIAL="$1"
adb get-state > /dev/null || { echo "push.sh: no phone answers; see: adb devices" >&2; exit 2; }
folder=/data/local/tmp/@FOLDER@
adb shell mkdir -p "$folder"
for file in @FILES@; do
  adb push "$file" "$folder/$file"
done
echo "the model lies in $folder"
