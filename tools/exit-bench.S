# A guest that measures what an exit to the hypervisor costs, for tools/kvm-test: a disk image without partitions, booted by the BIOS.
#
#   as --32 -o exit-bench.o exit-bench.S && ld -m elf_i386 -Ttext 0x7c00 --oformat binary -o exit-bench.img exit-bench.o
#
# It writes one line for each kind to the first serial port, "NAME TICKS", in ticks of the time-stamp counter for one operation (the best of
# ROUNDS averages), then "done", and ends with a triple fault. Kinds: a write and a read of a port (0x80, 0x3fd), a write and a read of a device
# register in memory (HPET), and how long after its deadline the local APIC's timer is served: by a running CPU and out of HLT. With a virtio
# disk also: a notification of a queue where nothing is new, by port and by memory, what the CPU spends on one for a request, and a request of
# one sector from there to its end.

.intel_syntax noprefix
.set ROUNDS, 7
.set ACCESSES, 1000
.set WAKES, 60
.set DELAY, 1000000
.set HPET_STATUS, 0xfed00020
.set HPET_COUNTER, 0xfed000f0
.set APIC, 0xfee00000
.set SECTORS, 9
.set REQUESTS, 100
.set DISK, 0x10011af4
.set RING, 0x100000
.set HEADER, 0x120000
.set DATA, 0x121000
.set NOTIFY_PORT, 16
.set NOTIFY, 0x3000
.set TIMER_VECTOR, 0x40

.code16
.globl _start
_start:
	cli
	xor ax, ax
	mov ds, ax
	mov es, ax
	mov ss, ax
	mov sp, 0x7000
	# The rest of the image, behind this sector.
	mov si, offset packet
	mov ah, 0x42
	int 0x13
	jc halt
	cli
	lgdt [gdt_pointer]
	mov eax, cr0
	or al, 1
	mov cr0, eax
	ljmp 8, offset protected
halt:
	hlt
	jmp halt
packet:
	.byte 16, 0
	.word SECTORS
	.word 0x7e00, 0
	.quad 1

.org 510
	.word 0xaa55

.code32
protected:
	mov ax, 16
	mov ds, ax
	mov es, ax
	mov ss, ax
	mov esp, 0x7000
	# Nothing but the timer's vector shall come: the 8259 pair is masked.
	mov al, 0xff
	out 0x21, al
	out 0xa1, al
	mov eax, offset timer
	mov word ptr [idt + 8 * TIMER_VECTOR], ax
	shr eax, 16
	mov word ptr [idt + 8 * TIMER_VECTOR + 6], ax
	lidt [idt_pointer]
	# The APIC is on, LINT0 masked, the timer in deadline mode.
	mov dword ptr [APIC + 0xf0], 0x1ff
	mov dword ptr [APIC + 0x350], 0x10000
	mov dword ptr [APIC + 0x320], 0x40000 + TIMER_VECTOR

	mov esi, offset port_write
	mov ebx, offset name_port_write
	mov ebp, ACCESSES
	call measure
	mov esi, offset port_read
	mov ebx, offset name_port_read
	call measure
	mov esi, offset mmio_write
	mov ebx, offset name_mmio_write
	call measure
	mov esi, offset mmio_read
	mov ebx, offset name_mmio_read
	call measure
	mov ebp, WAKES
	mov esi, offset spin
	mov ebx, offset name_spin
	call measure
	mov esi, offset wake
	mov ebx, offset name_wake
	call measure
	call find_disk
	jne 7f
	call set_up_disk
	mov ebp, ACCESSES
	mov esi, offset kick
	mov ebx, offset name_kick
	call measure
	mov esi, offset kick_memory
	mov ebx, offset name_kick_memory
	call measure
	mov ebp, REQUESTS
	mov esi, offset submit
	mov ebx, offset name_submit
	call measure
	mov esi, offset request
	mov ebx, offset name_request
	call measure
7:
	mov ebx, offset name_done
	call print
	# A triple fault.
	lidt [nothing]
	int3

# Runs the kind at ESI, which gives the ticks of EBP operations in EAX, and prints the best average under the name at EBX.
measure:
	mov dword ptr [best], 0xffffffff
	mov dword ptr [round], ROUNDS
1:
	mov ecx, ebp
	call esi
	xor edx, edx
	div ebp
	cmp eax, [best]
	jae 2f
	mov [best], eax
2:
	dec dword ptr [round]
	jnz 1b
	call print
	mov eax, [best]
	mov edi, offset digits_end
3:
	dec edi
	xor edx, edx
	mov ecx, 10
	div ecx
	add dl, '0'
	mov [edi], dl
	test eax, eax
	jnz 3b
	mov ebx, edi
	# Falls through.

# Writes the text at EBX to the serial port.
print:
	mov dx, 0x3fd
4:
	in al, dx
	test al, 0x20
	jz 4b
	mov al, [ebx]
	test al, al
	jz 5f
	mov dx, 0x3f8
	out dx, al
	inc ebx
	jmp print
5:
	ret

.macro timed body:vararg
	rdtsc
	mov edi, eax
	mov eax, 0
	mov edx, [operand]
6:
	\body
	dec ecx
	jnz 6b
	rdtsc
	sub eax, edi
	ret
.endm

port_write:
	xor eax, eax
	timed out 0x80, al
port_read:
	mov dword ptr [operand], 0x3fd
	timed in al, dx
mmio_write:
	timed mov dword ptr [HPET_STATUS], 0
mmio_read:
	timed mov eax, [HPET_COUNTER]

# Arms the timer; EDI has the low half of the deadline.
.macro arm
	mov byte ptr [fired], 0
	rdtsc
	add eax, DELAY
	adc edx, 0
	mov edi, eax
	mov [count], ecx
	mov ecx, 0x6e0
	wrmsr
	mov ecx, [count]
.endm

spin:
	mov dword ptr [total], 0
1:
	arm
	sti
2:
	pause
	cmp byte ptr [fired], 0
	je 2b
	cli
	dec ecx
	jnz 1b
	mov eax, [total]
	ret

wake:
	mov dword ptr [total], 0
1:
	arm
2:
	sti
	hlt
	cli
	cmp byte ptr [fired], 0
	je 2b
	dec ecx
	jnz 1b
	mov eax, [total]
	ret

timer:
	push eax
	push edx
	rdtsc
	sub eax, edi
	add [total], eax
	mov byte ptr [fired], 1
	mov dword ptr [APIC + 0xb0], 0
	pop edx
	pop eax
	iret

# Configuration space of the function in EBX: reads the register at AL into EAX, writes ECX to it.
config_address:
	movzx eax, al
	add eax, ebx
	mov dx, 0xcf8
	out dx, eax
	mov dx, 0xcfc
	ret
config_read:
	call config_address
	in eax, dx
	ret

# Finds the virtio disk: sets ZF and EBX if there is one.
find_disk:
	mov ebx, 0x80000000
1:
	xor eax, eax
	call config_read
	cmp eax, DISK
	je 2f
	add ebx, 0x800
	cmp ebx, 0x80010000
	jb 1b
	test ebx, ebx
2:
	ret

# Takes the disk at EBX over from the BIOS, by its legacy ports.
set_up_disk:
	mov al, 4
	call config_read
	or eax, 7
	out dx, eax
	mov al, 0x10
	call config_read
	and eax, ~3
	mov [ports], eax
	mov al, 0x20
	call config_read
	and eax, ~15
	add eax, NOTIFY
	mov [notify], eax
	# Reset, "found", "driver"; no features; queue 0.
	mov ebx, [ports]
	lea edx, [ebx + 18]
	xor eax, eax
	out dx, al
	mov al, 3
	out dx, al
	lea edx, [ebx + 4]
	xor eax, eax
	out dx, eax
	lea edx, [ebx + 14]
	out dx, ax
	mov edi, RING
	mov ecx, 0x8000
	rep stosd dword ptr es:[edi], eax
	lea edx, [ebx + 12]
	in ax, dx
	movzx ecx, ax
	# Behind the descriptors what is available, on the next page what is used.
	mov eax, ecx
	shl eax, 4
	add eax, RING
	mov [available], eax
	lea eax, [eax + 2 * ecx + 6 + 4095]
	and eax, ~4095
	mov [used], eax
	lea edx, [ebx + 8]
	mov eax, RING >> 12
	out dx, eax
	# One request that is made over and over: read the first sector, without an interrupt.
	mov edi, RING
	mov dword ptr [edi], HEADER
	mov dword ptr [edi + 8], 16
	mov dword ptr [edi + 12], 0x10001
	mov dword ptr [edi + 16], DATA
	mov dword ptr [edi + 24], 512
	mov dword ptr [edi + 28], 0x20003
	mov dword ptr [edi + 32], HEADER + 16
	mov dword ptr [edi + 40], 1
	mov dword ptr [edi + 44], 2
	mov eax, [available]
	mov word ptr [eax], 1
	lea edx, [ebx + 18]
	mov al, 7
	out dx, al
	lea eax, [ebx + NOTIFY_PORT]
	mov [operand], eax
	ret

kick:
	timed out dx, ax
kick_memory:
	push ebx
	mov ebx, [notify]
	call 1f
	pop ebx
	ret
1:
	timed mov word ptr [ebx], ax

# ECX requests one after the other, for each of which the CPU waits; EAX has the ticks of the notifications.
submit:
	mov dword ptr [total], 0
1:
	call make_available
	rdtsc
	mov edi, eax
	xor eax, eax
	mov edx, [operand]
	out dx, ax
	rdtsc
	sub eax, edi
	add [total], eax
	call wait_used
	dec ecx
	jnz 1b
	mov eax, [total]
	ret
request:
	mov dword ptr [total], 0
1:
	call make_available
	rdtsc
	mov edi, eax
	xor eax, eax
	mov edx, [operand]
	out dx, ax
	call wait_used
	rdtsc
	sub eax, edi
	add [total], eax
	dec ecx
	jnz 1b
	mov eax, [total]
	ret
make_available:
	mov eax, [available]
	inc word ptr [eax + 2]
	ret
wait_used:
	push ebx
	mov eax, [available]
	mov ax, [eax + 2]
	mov ebx, [used]
3:
	pause
	cmp ax, [ebx + 2]
	jne 3b
	pop ebx
	ret

name_port_write:
	.asciz "port_write "
name_port_read:
	.asciz "port_read "
name_mmio_write:
	.asciz "mmio_write "
name_mmio_read:
	.asciz "mmio_read "
name_spin:
	.asciz "timer_running "
name_wake:
	.asciz "timer_halted "
name_kick:
	.asciz "kick_port "
name_kick_memory:
	.asciz "kick_memory "
name_submit:
	.asciz "disk_submit "
name_request:
	.asciz "disk_request "
name_done:
	.asciz "done\n"
digits:
	.ascii "          "
digits_end:
	.asciz "\n"
.balign 8
best:
	.long 0
round:
	.long 0
count:
	.long 0
total:
	.long 0
fired:
	.long 0
# The port that is measured.
operand:
	.long 0
ports:
	.long 0
notify:
	.long 0
available:
	.long 0
used:
	.long 0
gdt:
	.quad 0
	.quad 0x00cf9b000000ffff
	.quad 0x00cf93000000ffff
gdt_pointer:
	.word 23
	.long gdt
idt_pointer:
	.word 8 * (TIMER_VECTOR + 1) - 1
	.long idt
nothing:
	.word 0
	.long 0
.balign 8
idt:
.rept TIMER_VECTOR + 1
	.word 0, 8, 0x8e00, 0
.endr
.org 512 * (SECTORS + 1)
