use super::*;
use proptest::prelude::*;
use std::string::ToString;
use std::vec;
use std::vec::Vec;

const MIB: u64 = 1 << 20;

/// A kernel of version 2.15 with 64 KiB, which needs 16 MiB.
fn file() -> Vec<u8> {
    let mut file = vec![0; 2 * SECTOR + (64 << 10)];
    let mut set =
        |offset: usize, bytes: &[u8]| file[offset..offset + bytes.len()].copy_from_slice(bytes);
    set(field::SETUP_SECTS, &[1]);
    set(field::SYSSIZE, &(4096_u32).to_le_bytes());
    set(field::BOOT_FLAG, &BOOT_FLAG.to_le_bytes());
    set(field::JUMP_DISTANCE, &[0x6a]);
    set(field::HEADER, b"HdrS");
    set(field::VERSION, &0x20f_u16.to_le_bytes());
    set(field::LOADFLAGS, &[LOADED_HIGH]);
    set(field::CODE32_START, &0x10_0000_u32.to_le_bytes());
    set(field::INITRD_ADDR_MAX, &0x7fff_ffff_u32.to_le_bytes());
    set(field::KERNEL_ALIGNMENT, &0x100_0000_u32.to_le_bytes());
    set(field::RELOCATABLE_KERNEL, &[1]);
    set(field::CMDLINE_SIZE, &2047_u32.to_le_bytes());
    set(field::PREF_ADDRESS, &0x100_0000_u64.to_le_bytes());
    set(field::INIT_SIZE, &0x100_0000_u32.to_le_bytes());
    file
}

fn with(offset: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = file();
    file[offset..offset + bytes.len()].copy_from_slice(bytes);
    file
}

/// Memory of 512 MiB with a hole from 256 to 384.
fn free() -> [Range<u64>; 3] {
    [0..0x9_fc00, MIB..256 * MIB, 384 * MIB..512 * MIB]
}

fn place(file: &[u8], free: &[Range<u64>], initrd: u64) -> Result<Placement, Error> {
    Kernel::parse(file)?.place(free.iter().cloned(), initrd)
}

#[test]
fn a_kernel_lies_where_it_wishes_and_its_initramfs_as_high_as_it_may() {
    let file = file();
    let kernel = Kernel::parse(&file).expect("a kernel");
    assert_eq!(kernel.system.len(), 64 << 10);
    let found = place(&file, &free(), 0x1234).expect("room");
    assert_eq!(found, Placement { kernel: 0x100_0000, initrd: 0x1fff_e000..0x1fff_f234 });
    let low = with(field::INITRD_ADDR_MAX, &0x1200_0000_u32.to_le_bytes());
    assert_eq!(place(&low, &free(), 0x1000).map(|found| found.initrd), Ok(0xfff_f000..0x1000_0000));
    assert_eq!(place(&file, &free(), 0).map(|found| found.initrd), Ok(0..0));
}

#[test]
fn a_relocatable_kernel_evades_and_another_does_not() {
    let taken = [MIB..20 * MIB, 60 * MIB..100 * MIB];
    assert_eq!(place(&file(), &taken, 0).map(|found| found.kernel), Ok(0x400_0000));
    let fixed = with(field::RELOCATABLE_KERNEL, &[0]);
    assert_eq!(place(&fixed, &taken, 0), Err(Error::NoRoom(16 * MIB)));
    // The initramfs goes where the kernel is not, or nowhere.
    let exact = core::slice::from_ref(&(16 * MIB..33 * MIB));
    assert_eq!(place(&file(), exact, MIB).map(|found| found.initrd), Ok(0x200_0000..0x210_0000));
    assert_eq!(place(&file(), exact, MIB + 1), Err(Error::NoRoomForInitrd(MIB + 1)));
    assert_eq!(place(&file(), &[], 0), Err(Error::NoRoom(16 * MIB)));
}

#[test]
fn a_kernel_of_version_2_05_says_less() {
    let mut old = with(field::VERSION, &0x205_u16.to_le_bytes());
    old[field::JUMP_DISTANCE] = 0x36;
    let kernel = Kernel::parse(&old).expect("a kernel");
    assert_eq!(kernel.longest_line(), 255);
    let found = place(&old, &free(), 0).expect("room");
    assert_eq!(found.kernel, 0x10_0000);
    let small = core::slice::from_ref(&(MIB..32 * MIB));
    assert_eq!(place(&old, small, 0), Err(Error::NoRoom(48 * MIB)));
    let line = "x".repeat(256);
    assert_eq!(
        kernel.parameters(&found, &line, 0, core::iter::empty()).err(),
        Some(Error::LongLine(255))
    );
}

#[test]
fn the_last_paragraph_need_not_be_full() {
    let whole = file();
    let system = |missing: usize| {
        Kernel::parse(&whole[..whole.len() - missing]).map(|kernel| kernel.system.len())
    };
    assert_eq!(system(0), Ok(64 << 10));
    assert_eq!(system(15), Ok((64 << 10) - 15));
    assert_eq!(system(16), Err(Error::Truncated));
}

#[test]
fn what_is_no_kernel_is_refused() {
    let refused = |file: &[u8]| Kernel::parse(file).err();
    assert_eq!(refused(&[]), Some(Error::NotLinux));
    assert_eq!(refused(&with(field::HEADER, b"HdrT")), Some(Error::NotLinux));
    assert_eq!(refused(&with(field::BOOT_FLAG, &[0])), Some(Error::NotLinux));
    assert_eq!(refused(&with(field::VERSION, &[4, 2])), Some(Error::TooOld(0x204)));
    assert_eq!(refused(&with(field::LOADFLAGS, &[0])), Some(Error::LoadedLow));
    assert_eq!(refused(&with(field::JUMP_DISTANCE, &[0xff])), Some(Error::BadHeader));
    assert_eq!(refused(&with(field::JUMP_DISTANCE, &[0])), Some(Error::BadHeader));
    assert_eq!(refused(&with(field::KERNEL_ALIGNMENT, &[3])), Some(Error::BadHeader));
    assert_eq!(refused(&with(field::KERNEL_ALIGNMENT, &[0; 4])), Some(Error::BadHeader));
    assert_eq!(refused(&with(field::SYSSIZE, &[0xff; 4])), Some(Error::Truncated));
    assert_eq!(refused(&with(field::SYSSIZE, &[0; 4])), Some(Error::Truncated));
    assert_eq!(refused(&with(field::SETUP_SECTS, &[0])), Some(Error::Truncated));
    assert_eq!(
        Error::TooOld(0x204).to_string(),
        "its boot protocol is 2.04; 2.05 is the oldest that is known"
    );
}

#[test]
fn the_page_has_the_header_the_screen_and_the_map() {
    let file = file();
    let kernel = Kernel::parse(&file).expect("a kernel");
    let placement = Placement { kernel: 0x100_0000, initrd: 0x200_0000..0x200_0005 };
    let map = [(0..0x9_fc00, 1), (7..7, 1), (0xf_0000..0x10_0000, 2)];
    let page = kernel.parameters(&placement, "quiet", 0xa020, map.into_iter()).expect("a page");
    assert_eq!(page[field::BOOT_FLAG..field::VERSION], file[field::BOOT_FLAG..field::VERSION]);
    assert_eq!(page[field::TYPE_OF_LOADER], 0xff);
    assert_eq!(long(&page, field::CODE32_START), 0x100_0000);
    assert_eq!(
        (long(&page, field::RAMDISK_IMAGE), long(&page, field::RAMDISK_SIZE)),
        (0x200_0000, 5)
    );
    assert_eq!(long(&page, field::CMD_LINE_PTR), 0xa020);
    assert_eq!((page[0x06], page[0x07], page[0x0e], page[0x0f]), (3, 80, 25, 1));
    assert_eq!(page[0x1e8], 2);
    assert_eq!((long(&page, 0x2d0 + 8), long(&page, 0x2d0 + 16)), (0x9_fc00, 1));
    assert_eq!(
        (long(&page, 0x2e4), long(&page, 0x2e4 + 8), long(&page, 0x2e4 + 16)),
        (0xf_0000, 0x1_0000, 2)
    );
    // What is not the header's nor set here is zero: the kernel takes a page that is not for one of an old loader.
    assert!(page[0x12..0x1e8].iter().chain(&page[0x26c..0x2d0]).all(|byte| *byte == 0));
    let many = core::iter::repeat_n((0..1, 1), RANGES + 1);
    assert_eq!(kernel.parameters(&placement, "", 0, many).err(), Some(Error::ManyRanges));
}

proptest! {
    /// Whatever is in a header: no panic, and what is placed lies in free memory, apart, and below what the kernel can reach.
    #[test]
    fn hostile_headers_do_no_harm(
        changes in proptest::collection::vec((field::SETUP_SECTS..0x270, any::<u8>()), 0..24),
        cut in 0_usize..(2 * SECTOR + (64 << 10) + 1),
        is_cut in any::<bool>(),
        initrd in prop_oneof![0..64 * MIB, any::<u64>()],
    ) {
        let mut file = file();
        for (offset, value) in changes {
            file[offset] = value;
        }
        if is_cut {
            file.truncate(cut);
        }
        if let Ok(kernel) = Kernel::parse(&file) {
            let _ = kernel.longest_line();
            if let Ok(found) = kernel.place(free().into_iter(), initrd) {
                let start = u64::from(found.kernel);
                let end = start + kernel.wish().1;
                prop_assert!(free().iter().any(|range| range.start <= start && end <= range.end));
                let (first, last) = (u64::from(found.initrd.start), u64::from(found.initrd.end));
                prop_assert_eq!(last - first, initrd);
                if initrd != 0 {
                    prop_assert!(free().iter().any(|range| range.start <= first && last <= range.end));
                    prop_assert!(last <= start || end <= first);
                    prop_assert!(last <= u64::from(long(&file, field::INITRD_ADDR_MAX)));
                }
                let page = kernel.parameters(&found, "", 0, free().into_iter().map(|range| (range, 1)));
                prop_assert!(page.is_ok());
            }
        }
    }
}
