//! Hands the program's layout to the linker: static, at a fixed address.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("none") {
        for argument in [
            "-static",
            "--build-id=none",
            "--gc-sections",
            "-Ttext-segment=0x08048000",
            "-zstack-size=0",
        ] {
            println!("cargo::rustc-link-arg-bins={argument}");
        }
    }
}
