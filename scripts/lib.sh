# What the scripts share. Sourced, from the top of the repository.
# shellcheck shell=bash

TARGET_DIRECTORY=$(realpath -m "${CARGO_TARGET_DIR:-target}")
CACHE_DIRECTORY=${HYPEMAN_CACHE:-$TARGET_DIRECTORY/cache}
ARCHITECTURE=$(uname -m)
MUSL_TARGET=$ARCHITECTURE-unknown-linux-musl
GNU_TARGET=$ARCHITECTURE-unknown-linux-gnu
GUEST_PROGRAM=$CACHE_DIRECTORY/hypeman-guest
export PATH=$CACHE_DIRECTORY/bin:$PATH:/usr/sbin:/sbin

say() { printf '\033[2m== %s\033[0m\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif have sudo; then
		sudo "$@"
	else
		fail "root is needed for: $* (run it yourself, or install sudo)"
	fi
}

is_static() { ! ldd "$1" >/dev/null 2>&1; }

python_with_venv() {
	local python
	for python in python3 /usr/bin/python3; do
		have "$python" && "$python" -c 'import venv, ensurepip' 2>/dev/null && { echo "$python"; return 0; }
	done
	return 1
}

refresh_apt() {
	[ "${apt_is_fresh:-}" ] || as_root apt-get update -qq >/dev/null 2>&1 || true
	apt_is_fresh=yes
}

install_with_apt() {
	have apt-get || fail "this is no Debian; install by hand: $*"
	say "installing $*"
	refresh_apt
	as_root env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends "$@" >"$TARGET_DIRECTORY/apt.log" 2>&1 ||
		{ tail -n 20 "$TARGET_DIRECTORY/apt.log" >&2; fail "apt-get could not install: $*"; }
}

# The guest kernel: the small one of kernel/build where it was built, else the distribution's, unpacked into the cache
# and never installed.
fetch_kernel() {
	[ -n "$(kernel_path)" ] && return
	say "fetching the distribution's guest kernel (unpacked under $CACHE_DIRECTORY, not installed)"
	kernel/fetch "$CACHE_DIRECTORY/kernel" >/dev/null
}

# File or directory of the guest kernel, empty when there is none yet.
kernel_path() {
	local candidate
	for candidate in "${HYPEMAN_KERNEL:-}" "$TARGET_DIRECTORY/kernel/vmlinux"; do
		[ -f "$candidate" ] && { echo "$candidate"; return; }
	done
	for candidate in "$CACHE_DIRECTORY"/kernel/boot/vmlinuz-*; do
		[ -f "$candidate" ] && echo "$CACHE_DIRECTORY/kernel"
		return
	done
}

# Another registry to talk to. Unpacked and not installed: its package would start a service.
fetch_registry() {
	local work
	have docker-registry && return
	have apt-get || return 0
	say "fetching docker-registry (unpacked under $CACHE_DIRECTORY, not installed)"
	mkdir -p "$CACHE_DIRECTORY/bin"
	work=$(mktemp -d "$CACHE_DIRECTORY/registry.XXXXXX")
	# apt drops its privileges to write here.
	chmod 755 "$work"
	download_registry() { (cd "$work" && apt-get download -qq docker-registry >/dev/null 2>&1); }
	if { download_registry || { refresh_apt; download_registry; }; } && dpkg -x "$work"/*.deb "$work/root"; then
		mv "$work/root/usr/bin/docker-registry" "$CACHE_DIRECTORY/bin/docker-registry"
	else
		say "apt cannot download docker-registry; the tests that need it say so"
	fi
	rm -rf "$work"
}

# The official SDKs and the property-based client, each by its own package manager, under target/contract.
install_sdks() {
	local contract=$TARGET_DIRECTORY/contract python
	mkdir -p "$contract/typescript"
	if ! [ -x "$contract/venv/bin/schemathesis" ]; then
		python=$(python_with_venv) || fail "python3 with venv is missing"
		say "installing the Python SDK and schemathesis"
		"$python" -m venv "$contract/venv" --clear
		"$contract/venv/bin/pip" install --quiet --disable-pip-version-check -r tests/contract/python/requirements.txt ||
			skipped "Python SDK and schemathesis" "pip could not install them"
	fi
	cp tests/contract/typescript/* "$contract/typescript/"
	if ! [ -d "$contract/typescript/node_modules/@onkernel/hypeman" ]; then
		say "installing @onkernel/hypeman"
		(cd "$contract/typescript" && npm ci --silent --no-audit --no-fund) ||
			skipped "TypeScript SDK" "npm could not install it"
	fi
}

# What was left out and why, told again at the end.
SKIPPED=()
skipped() { SKIPPED+=("$1: $2"); say "skipped $1: $2"; }
