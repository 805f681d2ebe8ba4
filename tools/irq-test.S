# A guest that tries what the interrupt controllers must do, for tools/kvm-test: a disk image without partitions, booted by the BIOS.
#
# It writes a line for each part to the first serial port and "done" at the end, then faults three times over; a line that does not come
# is a part that hangs. Parts: an interrupt of the 8259 pair out of HLT; a level-triggered one (HPET) through the I/O APIC, again after its end; one to
# this CPU itself; the second CPU by INIT and start-up messages, twice; interrupts to it out of its HLT; and all of it once more after a reset.

.intel_syntax noprefix
.set SECTORS, 7
.set APIC, 0xfee00000
.set IOAPIC, 0xfec00000
.set HPET, 0xfed00000
.set AP_PAGE, 0x9000
.set MARK, 0x6f
.set PIN_VECTOR, 0x41
.set IPI_VECTOR, 0x42
.set PIC_VECTOR, 0x20

.code16
.globl _start
_start:
	cli
	xor ax, ax
	mov ds, ax
	mov es, ax
	mov ss, ax
	mov sp, 0x7000
	mov si, offset packet
	mov ah, 0x42
	int 0x13
	jc dead
	cli
	lgdt [gdt_pointer]
	mov eax, cr0
	or al, 1
	mov cr0, eax
	ljmp 8, offset protected
dead:
	hlt
	jmp dead
packet:
	.byte 16, 0
	.word SECTORS
	.word 0x7e00, 0
	.quad 1

.org 510
	.word 0xaa55

# The second CPU starts here, copied to AP_PAGE, with CS at it.
ap_start:
	cli
	xor ax, ax
	mov ds, ax
	lgdt [gdt_pointer]
	mov eax, cr0
	or al, 1
	mov cr0, eax
	ljmp 8, offset ap_protected
ap_end:

.code32
.macro segments stack
	mov ax, 16
	mov ds, ax
	mov es, ax
	mov ss, ax
	mov esp, \stack
.endm

ap_protected:
	segments 0x6000
	lidt [idt_pointer]
	mov dword ptr [APIC + 0xf0], 0x1ff
	lock inc dword ptr [ap_starts]
1:
	sti
	hlt
	jmp 1b

.macro say name
	mov ebx, offset \name
	call print
.endm

# Waits until the counter at \place has reached \value, or for long enough to say that it does not.
.macro await place, value
	mov ecx, 40000000
1:
	pause
	cmp dword ptr [\place], \value
	jae 2f
	dec ecx
	jnz 1b
	say name_hangs
	jmp end
2:
.endm

protected:
	segments 0x7000
	# Handlers: each vector has a stub of 16 bytes.
	mov edi, offset idt
	mov eax, offset stub_pic
	mov ecx, PIC_VECTOR
	call gate
	mov eax, offset stub_pin
	mov ecx, PIN_VECTOR
	call gate
	mov eax, offset stub_ipi
	mov ecx, IPI_VECTOR
	call gate
	lidt [idt_pointer]

	# The 8259 pair through LINT0, as the BIOS leaves it: the timer, out of HLT.
	mov dword ptr [APIC + 0xf0], 0x1ff
	mov dword ptr [APIC + 0x350], 0x700
	mov al, 0x11
	out 0x20, al
	mov al, PIC_VECTOR
	out 0x21, al
	mov al, 4
	out 0x21, al
	mov al, 1
	out 0x21, al
	mov al, 0xfe
	out 0x21, al
	mov al, 0xff
	out 0xa1, al
	mov al, 0x34
	out 0x43, al
	mov al, 0x00
	out 0x40, al
	mov al, 0x40
	out 0x40, al
1:
	sti
	hlt
	cli
	cmp dword ptr [pic_count], 5
	jb 1b
	mov al, 0xff
	out 0x21, al
	mov dword ptr [APIC + 0x350], 0x10000
	say name_pic

	# A level-triggered input, to this CPU: HPET's first timer, by the first route that it can take from 16 on.
	mov eax, [HPET + 0x104]
	shr eax, 16
	bsf edx, eax
	jz 5f
	add edx, 16
	mov [pin], edx
	lea ebx, [edx * 2 + 0x11]
	mov dword ptr [IOAPIC], ebx
	mov dword ptr [IOAPIC + 0x10], 0
	lea ebx, [edx * 2 + 0x10]
	mov dword ptr [IOAPIC], ebx
	mov dword ptr [IOAPIC + 0x10], 0x8000 + PIN_VECTOR
	mov dword ptr [HPET + 0x10], 0
	mov dword ptr [HPET + 0xf0], 0
	mov dword ptr [HPET + 0xf4], 0
	mov eax, edx
	shl eax, 9
	or eax, 0x106
	mov [HPET + 0x100], eax
	mov dword ptr [HPET + 0x108], 200000
	mov dword ptr [HPET + 0x10], 1
1:
	sti
	hlt
	cli
	cmp dword ptr [pin_count], 5
	jb 1b
	mov dword ptr [HPET + 0x100], 0
	mov dword ptr [HPET + 0x10], 0
	say name_level
5:
	# To this CPU itself.
	mov dword ptr [APIC + 0x310], 0
	mov dword ptr [APIC + 0x300], 0x44000 + IPI_VECTOR
	sti
	nop
	await ipi_count, 1
	cli
	say name_self

	# The second CPU, twice.
	mov esi, offset ap_start
	mov edi, AP_PAGE
	mov ecx, offset ap_end - ap_start
	rep movsb
	mov dword ptr [round], 1
4:
	mov dword ptr [APIC + 0x310], 0x1000000
	mov dword ptr [APIC + 0x300], 0x4500
	call rest
	mov dword ptr [APIC + 0x300], 0x4600 + (AP_PAGE >> 12)
	mov ebp, [round]
	mov ecx, 40000000
1:
	pause
	cmp [ap_starts], ebp
	jae 2f
	dec ecx
	jnz 1b
	say name_hangs
	jmp end
2:
	inc dword ptr [round]
	cmp dword ptr [round], 2
	jbe 4b
	say name_second

	# Interrupts to it, one after the other.
	mov dword ptr [round], 1
4:
	inc dword ptr [round]
	call rest
	mov dword ptr [APIC + 0x310], 0x1000000
	mov dword ptr [APIC + 0x300], 0x4000 + IPI_VECTOR
	mov ebp, [round]
	mov ecx, 40000000
1:
	pause
	cmp [ipi_count], ebp
	jae 2f
	dec ecx
	jnz 1b
	say name_hangs
	jmp end
2:
	cmp dword ptr [round], 20
	jb 4b
	say name_ipi

	# Once more after a reset.
	mov al, MARK
	out 0x70, al
	in al, 0x71
	cmp al, 0x5a
	je finish
	mov al, MARK
	out 0x70, al
	mov al, 0x5a
	out 0x71, al
	say name_reset
	mov al, 6
	mov dx, 0xcf9
	out dx, al
1:
	hlt
	jmp 1b
finish:
	mov al, MARK
	out 0x70, al
	xor al, al
	out 0x71, al
	say name_done
end:
	lidt [nothing]
	int3

rest:
	mov ecx, 200
1:
	out 0x80, al
	dec ecx
	jnz 1b
	ret

# Puts the handler at EAX into the gate of vector ECX.
gate:
	mov [idt + ecx * 8], ax
	shr eax, 16
	mov [idt + ecx * 8 + 6], ax
	ret

stub_pic:
	push eax
	inc dword ptr [pic_count]
	mov al, 0x20
	out 0x20, al
	pop eax
	iret

stub_pin:
	push eax
	inc dword ptr [pin_count]
	# The line drops when the status is cleared. The next one is due a little later, or at once where that time has passed: its status must
	# not be cleared with this one's.
	mov dword ptr [HPET + 0x20], 1
	mov eax, [HPET + 0xf0]
	add eax, 100000
	mov [HPET + 0x108], eax
	mov dword ptr [APIC + 0xb0], 0
	pop eax
	iret

stub_ipi:
	lock inc dword ptr [ipi_count]
	mov dword ptr [APIC + 0xb0], 0
	iret

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

name_pic:
	.asciz "8259\n"
name_level:
	.asciz "level\n"
name_self:
	.asciz "self\n"
name_second:
	.asciz "second\n"
name_ipi:
	.asciz "ipi\n"
name_reset:
	.asciz "reset\n"
name_hangs:
	.asciz "hangs\n"
name_done:
	.asciz "done\n"
.balign 8
pic_count:
	.long 0
pin_count:
	.long 0
ipi_count:
	.long 0
ap_starts:
	.long 0
round:
	.long 0
pin:
	.long 0
gdt:
	.quad 0
	.quad 0x00cf9b000000ffff
	.quad 0x00cf93000000ffff
gdt_pointer:
	.word 23
	.long gdt
idt_pointer:
	.word 8 * (IPI_VECTOR + 1) - 1
	.long idt
nothing:
	.word 0
	.long 0
.balign 8
idt:
.rept IPI_VECTOR + 1
	.word 0, 8, 0x8e00, 0
.endr
.org 512 * (SECTORS + 1)
