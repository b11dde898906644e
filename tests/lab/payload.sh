# What the lab's hosts get to run: the tool, the tests of the machine, and what is common to cases with a Linux guest. Sourced by `run`.

mkdir -p "$payload"/{bin,tests}
cargo build --release -q -p tandem
cp "${CARGO_TARGET_DIR:-target}/release/tandem" "$payload/bin/"
cp tests/lab/linux.sh "$payload/"
# As the tests build it where there is cargo.
guest=${CARGO_TARGET_DIR:-target}/tmp/guest
cargo build -q -p guest --features bare --profile guest --target-dir "$guest"
cp "$guest/guest/guest" "$payload/guest"
cargo test --release -q -p machine --no-run --message-format=json | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' |
    while IFS= read -r test; do
        name=$(basename "$test")
        cp "$test" "$payload/tests/${name%-*}-$(printf '%s' "$test" | cksum | cut -c1-4)"
    done
