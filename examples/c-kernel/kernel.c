/*
 * A small kernel for VMI: processes in ring 3, in address spaces of their own, switched by a timer. It shows what a
 * kernel does to run on a VMI ROM if there is one, and on bare hardware if not, from one binary:
 *   1. find a ROM, or else take the linked-in one, and bind all calls (bind);
 *   2. do everything privileged by calls: segments and interrupts (segments), page tables (paging), devices
 *      (console, timer), the switch between address spaces (schedule), the way back (boot.S).
 * Nothing here executes a privileged instruction. Physical memory is mapped where it is, up to 16 MiB.
 */

#include "vmi.h"

enum {
    PAGE = 4096,
    PROCESSES = 2,
    TICKS = 20,             /* Each process ends after as many. */
    KERNEL_TABLES = 4,      /* Page tables of 4 MiB each. */
    KERNEL_CODE = 0x08, KERNEL_DATA = 0x10, USER_CODE = 0x1b, USER_DATA = 0x23, TASK = 0x28,
    TIMER_VECTOR = 32, SYSTEM_CALL_VECTOR = 128, INTERRUPTS_ENABLED = 0x202,
    PRESENT = 1, WRITABLE = 2, USER = 4, CR0_WP = 1 << 16
};

#define CR0_PG 0x80000000u
#define USER_TEXT 0x40000000u   /* One page of text, the same in every process. */
#define USER_PAGE 0x40001000u   /* One page for data and stack, of each process's own. */
#define WINDOW 0xfff000u        /* Through which the kernel sees a process's page: its own last one. */

/* What the entries in boot.S leave on the stack. */
struct frame {
    vmi_u32 es, ds;
    vmi_u32 edi, esi, ebp, unused, ebx, edx, ecx, eax;
    vmi_u32 vector, eip, cs, eflags, esp, ss;
};

struct process {
    struct frame *frame;
    vmi_u32 *directory, *table;
    vmi_u32 ticks, calls, first, count;
    vmi_u8 stack[PAGE] __attribute__((aligned(16)));
};

/* Every call of the interface. boot.S jumps through it as well. */
struct vmi_calls calls;

static struct process processes[PROCESSES];
static struct process *current;
static vmi_u32 *kernel_tables[KERNEL_TABLES];

extern vmi_u8 user_start[], kernel_end[];
extern const vmi_u8 entries[][16];
void load_segments(void);
__attribute__((noreturn)) VMI_REGPARM void resume(struct frame *frame);
__attribute__((noreturn)) void kernel(void);
VMI_REGPARM struct frame *interrupt(struct frame *frame);

/* --- Console: the first serial port, and the screen --------------------- */

enum { COM1 = 0x3f8, LINE_STATUS = COM1 + 5, CAN_SEND = 0x20, COLUMNS = 80, ROWS = 25 };

static volatile vmi_u16 *const screen = (volatile vmi_u16 *)0xb8000;

static void put(char c)
{
    static unsigned cursor;
    unsigned patience = 100000;

    while (!(vmi_INB(calls.INB, LINE_STATUS) & CAN_SEND) && --patience) {}
    vmi_OUTB(calls.OUTB, (vmi_u8)c, COM1);
    if (c == '\n')
        cursor += COLUMNS - cursor % COLUMNS;
    else
        screen[cursor++] = (vmi_u16)(0x0700 | (vmi_u8)c);
    cursor %= COLUMNS * ROWS;
}

static void print(const char *text)
{
    for (; *text; text++) {
        if (*text == '\n')
            put('\r');
        put(*text);
    }
}

static void print_number(vmi_u32 number, unsigned base)
{
    char digits[11] = "", *at = digits + sizeof digits - 1;

    do
        *--at = "0123456789ABCDEF"[number % base];
    while (number /= base);
    print(at);
}

static void console(void)
{
    /* 115200 baud, 8 bits, no interrupts. */
    static const vmi_u8 settings[][2] = {{1, 0}, {3, 0x80}, {0, 1}, {1, 0}, {3, 3}, {2, 7}, {4, 3}};
    unsigned i;

    for (i = 0; i < sizeof settings / sizeof *settings; i++)
        vmi_OUTB(calls.OUTB, settings[i][1], COM1 + settings[i][0]);
    for (i = 0; i < COLUMNS * ROWS; i++)
        screen[i] = 0x0720;
}

/* --- The end ------------------------------------------------------------- */

enum { DEBUG_CONSOLE = 0xe9, DEBUG_EXIT = 0xf4, PASSED = 0x10, FAILED = 0x11 };

/*
 * Ends QEMU, or else this processor. Who knows what a PC has at the exit port: only what has an emulator's debug
 * console, which answers its own number, may have an exit.
 */
static __attribute__((noreturn)) void end(vmi_u8 verdict)
{
    if ((vmi_INB(calls.INB, DEBUG_CONSOLE) & 0xff) == DEBUG_CONSOLE)
        vmi_OUTB(calls.OUTB, verdict, DEBUG_EXIT);
    for (;;)
        calls.Shutdown();
}

static __attribute__((noreturn)) void fail(const char *why, vmi_u32 number)
{
    print("c-kernel: failed: ");
    print(why);
    print_number(number, 16);
    print("h\n");
    end(FAILED);
}

/* --- 1. Which implementation -------------------------------------------- */

/* The platform's ROM if there is one that can be used, and else the linked-in one. */
static const struct vmi_rom_header *bind(void)
{
    const struct vmi_rom_header *rom = vmi_find_rom((const void *)VMI_SCAN_START, 3, 0);

    /* Linux would also look at the licence, and not at the answers. */
    if (rom && vmi_init(rom) == 0 && vmi_bind(&calls, rom) == 0)
        return rom;
    vmi_init(&vmi_native_rom);
    /* This kernel runs on one processor, so nobody sees a call site half rewritten. */
    vmi_native_set_site_rule(VMI_SITE_RULE_ANYWHERE);
    vmi_bind(&calls, &vmi_native_rom);
    return &vmi_native_rom;
}

/* --- 2. Segments and interrupts ----------------------------------------- */

static vmi_u32 gdt[6][2] __attribute__((aligned(PAGE))) = {
    {0, 0},
    {0x0000ffff, 0x00cf9b00}, {0x0000ffff, 0x00cf9300},     /* The kernel's code and data: all of memory. */
    {0x0000ffff, 0x00cffb00}, {0x0000ffff, 0x00cff300}      /* The same in ring 3. */
};
static vmi_u32 idt[SYSTEM_CALL_VECTOR + 1][2] __attribute__((aligned(PAGE)));
static vmi_u32 task[26] __attribute__((aligned(128)));

static void segments(void)
{
    struct vmi_descriptor_table table;
    vmi_u32 base = (vmi_u32)task;
    unsigned vector;

    table.limit = sizeof gdt - 1;
    table.base = (vmi_u32)gdt;
    calls.SetGDT(&table);
    load_segments();
    task[2] = KERNEL_DATA;          /* SS for entries into ring 0; ESP comes by UpdateKernelStack. */
    task[25] = sizeof task << 16;   /* No bitmap of ports. */
    calls.WriteGDTEntry(gdt, TASK / 8, base << 16 | (sizeof task - 1),
                        (base & 0xff000000) | 0x8900 | (base >> 16 & 0xff));
    calls.SetTR(TASK);
    calls.SetLDT(0);

    for (vector = 0; vector <= SYSTEM_CALL_VECTOR; vector++) {
        vmi_u32 entry = (vmi_u32)entries[vector], kind = vector == SYSTEM_CALL_VECTOR ? 0xee00 : 0x8e00;

        calls.WriteIDTEntry(idt, vector, KERNEL_CODE << 16 | (entry & 0xffff), (entry & 0xffff0000) | kind);
    }
    table.limit = sizeof idt - 1;
    table.base = (vmi_u32)idt;
    calls.SetIDT(&table);
}

/* --- 3. Page tables ------------------------------------------------------ */

/* Pages behind the kernel, in their order. */
static vmi_u32 *new_page(void)
{
    static vmi_u8 *next = kernel_end;
    vmi_u32 *page = (vmi_u32 *)(void *)next;
    volatile vmi_u32 *word;

    next += PAGE;
    for (word = page; word < page + PAGE / 4; word++)
        *word = 0;
    return page;
}

/* A page that becomes a page table: whoever shadows page tables must know before it is used. */
static vmi_u32 *new_table(vmi_u32 level)
{
    vmi_u32 *table = new_page();

    calls.AllocatePage((vmi_u32)table / PAGE, level | VMI_PAGE_ZEROED, 0, 0, 0);
    return table;
}

/* An address space with the kernel in it. */
static vmi_u32 *new_directory(void)
{
    vmi_u32 *directory = new_table(VMI_PAGE_PD);
    unsigned i;

    for (i = 0; i < KERNEL_TABLES; i++)
        calls.SetPxE((vmi_u32)kernel_tables[i] | PRESENT | WRITABLE, &directory[i], VMI_ENTRY_PD);
    return directory;
}

static void paging(void)
{
    unsigned i;

    /* Where page tables are mapped, so that the ROM can tell which an entry belongs to. */
    calls.SetLinearMapping(0, 0, KERNEL_TABLES * 1024, 0);
    for (i = 0; i < KERNEL_TABLES; i++)
        kernel_tables[i] = new_table(VMI_PAGE_PT);
    for (i = 0; i < KERNEL_TABLES * 1024; i++)
        calls.SetPxE(i * PAGE | PRESENT | WRITABLE, &kernel_tables[i / 1024][i % 1024], VMI_ENTRY_PT);
    calls.SetCR3((vmi_u32)new_directory());
    calls.SetCR0(calls.GetCR0() | CR0_PG | CR0_WP);
}

/* --- 4. The timer: channel 0 of the interval timer, by the first interrupt controller --- */

enum {
    MASTER = 0x20, END_OF_INTERRUPT = 0x20, CHANNEL_0 = 0x40, MODE = 0x43,
    DIVISOR = 11932 /* 100 Hz */
};

static void timer(void)
{
    static const vmi_u8 settings[][2] = {
        {MASTER, 0x11}, {MASTER + 1, TIMER_VECTOR}, {MASTER + 1, 4}, {MASTER + 1, 1},
        {MASTER + 1, 0xfe}, /* All lines but the timer's are masked, and with them the second controller. */
        {MODE, 0x34}, {CHANNEL_0, DIVISOR & 0xff}, {CHANNEL_0, DIVISOR >> 8}
    };
    unsigned i;

    for (i = 0; i < sizeof settings / sizeof *settings; i++) {
        vmi_OUTB(calls.OUTB, settings[i][1], settings[i][0]);
        calls.IODelay();
    }
}

/* --- 5. Processes -------------------------------------------------------- */

/* What a process does. It is in the section of the processes' text, and uses nothing of the kernel's. */
__attribute__((section(".user"), noreturn, used)) static void user(void)
{
    volatile vmi_u32 *count = (volatile vmi_u32 *)USER_PAGE;

    for (;;)
        if (++*count % 10000 == 0)
            __asm__ __volatile__("int $0x80" : : "a"(*count) : "memory");
}

static void start(struct process *process, vmi_u32 first)
{
    vmi_u32 *page = new_page();
    struct frame *frame = (struct frame *)(void *)(process->stack + PAGE) - 1;

    process->directory = new_directory();
    process->table = new_table(VMI_PAGE_PT);
    calls.SetPxE((vmi_u32)process->table | PRESENT | WRITABLE | USER,
                 &process->directory[USER_TEXT >> 22], VMI_ENTRY_PD);
    calls.SetPxE((vmi_u32)user_start | PRESENT | USER, &process->table[0], VMI_ENTRY_PT);
    calls.SetPxE((vmi_u32)page | PRESENT | WRITABLE | USER, &process->table[1], VMI_ENTRY_PT);
    calls.SetPxE((vmi_u32)page | PRESENT | WRITABLE, &kernel_tables[WINDOW >> 22][WINDOW >> 12 & 1023],
                 VMI_ENTRY_PT);
    calls.InvalPage(WINDOW);
    *(volatile vmi_u32 *)WINDOW = process->first = first;
    frame->es = frame->ds = frame->ss = USER_DATA;
    frame->cs = USER_CODE;
    frame->eip = (vmi_u32)user;
    frame->esp = USER_PAGE + PAGE;
    frame->eflags = INTERRUPTS_ENABLED;
    process->frame = frame;
}

/* Takes a process's address space apart. Another one is in use. */
static void release(struct process *process)
{
    calls.SetPxE(0, &process->directory[USER_TEXT >> 22], VMI_ENTRY_PD);
    calls.FlushTLB(VMI_FLUSH_TLB);
    calls.ReleasePage((vmi_u32)process->table / PAGE, VMI_PAGE_PT);
    calls.ReleasePage((vmi_u32)process->directory / PAGE, VMI_PAGE_PD);
}

static __attribute__((noreturn)) void finish(void)
{
    vmi_u32 system_calls = 0;
    unsigned i;

    calls.SetCR3((vmi_u32)new_directory());
    for (i = 0; i < PROCESSES; i++) {
        struct process *process = &processes[i];

        system_calls += process->calls;
        release(process);
        print("c-kernel: process ");
        print_number(i + 1, 10);
        print(": ");
        print_number(process->ticks, 10);
        print(" ticks, ");
        print_number(process->calls, 10);
        print(" system calls, counted up to ");
        print_number(process->count, 10);
        print("\n");
        /* A count that another process had changed would not fit the number of calls. */
        if (process->calls == 0 || process->count != process->first + process->calls * 10000)
            fail("wrong count of process ", i + 1);
    }
    print("c-kernel: done: every process had its ticks, system calls: ");
    print_number(system_calls, 10);
    put('\n');
    end(PASSED);
}

/* The next process that is not at its end, from the one behind the current on; and its address space. */
static struct frame *schedule(void)
{
    unsigned i, next = current ? (unsigned)(current - processes) : PROCESSES - 1;

    for (i = 0; i < PROCESSES; i++) {
        next = (next + 1) % PROCESSES;
        if (processes[next].ticks < TICKS) {
            current = &processes[next];
            /* All at once: a hypervisor is told of the switch at its end, once. */
            calls.SetLazyMode(VMI_LAZY_CPU);
            calls.UpdateKernelStack((vmi_u32)task, (vmi_u32)(current->stack + PAGE));
            calls.SetCR3((vmi_u32)current->directory);
            calls.SetLazyMode(VMI_LAZY_OFF);
            return current->frame;
        }
    }
    finish();
}

/* Every interrupt and exception, with interrupts disabled. Goes on in the frame that is the result. */
VMI_REGPARM struct frame *interrupt(struct frame *frame)
{
    switch (frame->vector) {
    case TIMER_VECTOR:
        vmi_OUTB(calls.OUTB, END_OF_INTERRUPT, MASTER);
        current->ticks++;
        current->frame = frame;
        return schedule();
    case SYSTEM_CALL_VECTOR:
        current->calls++;
        current->count = frame->eax;
        return frame;
    default:
        fail("exception ", frame->vector);
    }
}

void kernel(void)
{
    const struct vmi_rom_header *rom = bind();
    unsigned i;

    console();
    print("c-kernel: VMI 3.0, ");
    print(rom == &vmi_native_rom ? "linked in" : "platform ROM");
    print(", at 0x");
    print_number((vmi_u32)rom, 16);
    print("\n");
    segments();
    paging();
    timer();
    for (i = 0; i < PROCESSES; i++)
        start(&processes[i], i * 1000000000);
    resume(schedule());
}
