//! The same source gives the same bytes, wherever and by whomever it is built.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;
use std::process::Command;
use xtask::artifacts;

/// Copies what a checkout has: the tree without what builds and version control put there.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == "target" || name == ".git" {
            continue;
        }
        let target = to.join(&name);
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target).with_context(|| target.display().to_string())?;
        }
    }
    Ok(())
}

/// Another folder, home, name, language, clock zone and mask for new files.
#[test]
fn another_folder_and_another_user_give_the_same_bytes() -> Result<()> {
    let built = artifacts::ensure()?;
    let folder = tempfile::tempdir()?;
    let tree = folder.path().join("somebody else's folder");
    copy_tree(&xtask::workspace(), &tree)?;
    let home = folder.path().join("home");
    fs::create_dir(&home)?;

    // Cargo's store of packages stays: its path must not show either.
    let store = std::env::var_os("CARGO_HOME")
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo").into()));
    let mut command = Command::new("sh");
    command
        .args(["-c", "umask 077; exec \"$0\" build"])
        .arg(env!("CARGO_BIN_EXE_xtask"))
        .current_dir(&tree)
        .env("CARGO_MANIFEST_DIR", tree.join("xtask"))
        .env_remove("CARGO_TARGET_DIR")
        .envs([
            ("USER", "somebody"),
            ("LOGNAME", "somebody"),
            ("LANG", "tr_TR.UTF-8"),
            ("TZ", "Asia/Tokyo"),
        ])
        .env("HOME", &home)
        .envs(store.map(|store| ("CARGO_HOME", store)));
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    for rom in [&built.native, &built.call, &built.slots_13_0, &built.slots_13_3] {
        let name = rom.file_name().context("a file")?;
        let other = fs::read(tree.join("target/rom").join(name))?;
        assert!(fs::read(rom)? == other, "{} differs", rom.display());
    }
    Ok(())
}
