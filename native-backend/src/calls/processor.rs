//! Identification, model-specific, control and debug registers, counters, caches.

short_routines! {
    /// EAX value.
    SetCR0 { "mov cr0, eax"; "ret" }

    /// EAX value.
    SetCR2 { "mov cr2, eax"; "ret" }

    /// EAX value.
    SetCR3 { "mov cr3, eax"; "ret" }

    /// EAX value.
    SetCR4 { "mov cr4, eax"; "ret" }

    /// -> EAX.
    GetCR0 { "mov eax, cr0"; "ret" }

    /// -> EAX.
    GetCR2 { "mov eax, cr2"; "ret" }

    /// -> EAX.
    GetCR3 { "mov eax, cr3"; "ret" }

    /// -> EAX.
    GetCR4 { "mov eax, cr4"; "ret" }

    /// Nothing in, nothing out.
    WBINVD { "wbinvd"; "ret" }

    /// -> EDX:EAX.
    RDTSC { "rdtsc"; "ret" }

    /// Nothing in, nothing out.
    CLTS { "clts"; "ret" }
}

routines! {
    /// EAX leaf, ECX subleaf -> EAX, EBX, ECX, EDX. Nothing is masked: the ROM takes nothing away.
    CPUID {
        "cpuid",
        "ret",
    }

    /// EDX:EAX value, ECX index.
    WRMSR {
        "wrmsr",
        "ret",
    }

    /// ECX index -> EDX:EAX.
    RDMSR {
        "rdmsr",
        "ret",
    }

    /// Nothing in, nothing out.
    INVD {
        "invd",
        "ret",
    }

    /// Nothing in, nothing out: the processor rests for a moment.
    Pause {
        "pause",
        "ret",
    }

    /// ECX counter -> EDX:EAX.
    RDPMC {
        "rdpmc",
        "ret",
    }

    /// EAX state, EDX APIC number: both ignored, and nothing is changed.
    ///
    /// Hardware starts a processor in real mode where the STARTUP IPI points, and kernels bring a
    /// trampoline of their own for that, which they send with or without this call.
    SetInitialAPState {
        "ret",
    }
}

long_routines! {
    /// EAX register 0 to 7, EDX value; changes EAX, ECX, flags. Another number does nothing.
    ///
    /// The register's number is part of the instruction, so there is one for each, four bytes
    /// apart: a move of three bytes and a return of one. The call tells where they are.
    SetDR {
        "cmp eax, 7",
        "ja 3f",
        "call 2f",
        "mov dr0, edx",
        "ret",
        "mov dr1, edx",
        "ret",
        "mov dr2, edx",
        "ret",
        "mov dr3, edx",
        "ret",
        "mov dr4, edx",
        "ret",
        "mov dr5, edx",
        "ret",
        "mov dr6, edx",
        "ret",
        "mov dr7, edx",
        "3: ret",
        "2: pop ecx",
        "lea ecx, [ecx + eax * 4]",
        "jmp ecx",
    }

    /// EAX register 0 to 7 -> EAX; changes ECX, flags. Another number reads as 0.
    ///
    /// Laid out as SetDR.
    GetDR {
        "cmp eax, 7",
        "ja 3f",
        "call 2f",
        "mov eax, dr0",
        "ret",
        "mov eax, dr1",
        "ret",
        "mov eax, dr2",
        "ret",
        "mov eax, dr3",
        "ret",
        "mov eax, dr4",
        "ret",
        "mov eax, dr5",
        "ret",
        "mov eax, dr6",
        "ret",
        "mov eax, dr7",
        "ret",
        "2: pop ecx",
        "lea ecx, [ecx + eax * 4]",
        "jmp ecx",
        "3: xor eax, eax",
        "ret",
    }
}
