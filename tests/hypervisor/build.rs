//! Hands the hypervisor's layout to the linker.

#[path = "../bare.rs"]
mod bare;

fn main() {
    let in_long_mode = ["-melf_x86_64", "-znorelro", "-zmax-page-size=4096", "--no-dynamic-linker"];
    bare::link(Some("linker.ld"), &in_long_mode);
}
