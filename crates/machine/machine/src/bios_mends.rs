//! Mends faults of SeaBIOS in the image that the distribution's package brings (`src/hw/mpt-scsi.c` of SeaBIOS 1.16, as the driver for
//! LsiLogic controllers is compiled for 16-bit mode). A boot loader that reads from such a controller would find its memory damaged:
//!
//! - The request, on the stack, is cleared by `rep stosl` through a segment register that still is the caller's: 56 bytes elsewhere become
//!   zeros, and the request's reserved fields are what was on the stack.
//! - After an error the frame for the next reply is given back by its offset in the BIOS's segment, not by its address: the next error
//!   is written there.
//!
//! The places are known by their code. An image without them, as one in which they were mended, stays as it is.

/// `lea edi, [esp + n]`; `mov ecx, count`; `xor eax, eax`; `rep stosd` to ES:DI. `None` stands for any byte.
const CLEAR: [Option<u8>; 18] = {
    const fn is(byte: u8) -> Option<u8> {
        Some(byte)
    }
    [
        is(0x67),
        is(0x66),
        is(0x8d),
        is(0x7c),
        is(0x24),
        None, //
        is(0x66),
        is(0xb9),
        None,
        None,
        is(0),
        is(0), //
        is(0x66),
        is(0x31),
        is(0xc0),
        is(0x66),
        is(0xf3),
        is(0xab),
    ]
};

/// `mov eax, offset`; `out dx, eax`; `mov ecx, 12` (the BIOS's code for a bad track).
const GIVE_BACK: [Option<u8>; 14] = [
    Some(0x66),
    Some(0xb8),
    None,
    None,
    Some(0),
    Some(0), //
    Some(0x66),
    Some(0xef), //
    Some(0x66),
    Some(0xb9),
    Some(0x0c),
    Some(0),
    Some(0),
    Some(0),
];

/// `mov eax, segment`; `mov ds, ax`, as every entry of the BIOS takes its own segment.
const OWN_SEGMENT: [Option<u8>; 8] =
    [Some(0x66), Some(0xb8), None, None, Some(0), Some(0), Some(0x8e), Some(0xd8)];

fn places<const N: usize>(image: &[u8], pattern: &[Option<u8>; N]) -> Vec<usize> {
    let fits =
        |window: &[u8]| window.iter().zip(pattern).all(|(byte, wanted)| wanted.is_none_or(|w| w == *byte));
    image.windows(N).enumerate().filter(|(_, window)| fits(window)).map(|(at, _)| at).collect()
}

/// Mends what is known; returns how many places were mended.
pub(crate) fn mend(image: &mut [u8]) -> usize {
    let mut mended = 0;
    for at in places(image, &CLEAR) {
        let code = &mut image[at..at + CLEAR.len()];
        let (offset, [low, high]) = (code[5], [code[8], code[9]]);
        // `push ss`; `pop es`; then as before, but for the count, of which the processor takes 16 bits here.
        let better = [
            0x16, 0x07, 0x67, 0x66, 0x8d, 0x7c, 0x24, offset, 0xb9, low, high, 0x66, 0x31, 0xc0, 0x66, 0xf3,
            0xab, 0x90,
        ];
        code.copy_from_slice(&better);
        mended += 1;
    }
    let word = |image: &[u8], at: usize| u16::from_le_bytes([image[at + 2], image[at + 3]]);
    // Other values are those of the BIOS data area.
    let segment =
        places(image, &OWN_SEGMENT).into_iter().map(|at| word(image, at)).find(|segment| *segment >= 0xc000);
    if let Some(segment) = segment {
        for at in places(image, &GIVE_BACK) {
            let address = u32::from(segment) * 16 + u32::from(word(image, at));
            image[at + 2..at + 6].copy_from_slice(&address.to_le_bytes());
            mended += 1;
        }
    }
    mended
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> Vec<u8> {
        text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
    }

    #[test]
    fn a_cleared_request_is_cleared_on_the_stack_and_a_frame_is_given_back_by_its_address() {
        let mut image = bytes(
            "90 66 b8 40 00 00 00 8e d8 66 b8 80 d9 00 00 8e d8 \
             67 66 8d 7c 24 30 66 b9 0e 00 00 00 66 31 c0 66 f3 ab 90 \
             66 b8 5c f4 00 00 66 ef 66 b9 0c 00 00 00 c3",
        );
        assert_eq!(mend(&mut image), 2);
        let wanted = bytes(
            "90 66 b8 40 00 00 00 8e d8 66 b8 80 d9 00 00 8e d8 \
             16 07 67 66 8d 7c 24 30 b9 0e 00 66 31 c0 66 f3 ab 90 90 \
             66 b8 5c 8c 0e 00 66 ef 66 b9 0c 00 00 00 c3",
        );
        assert_eq!(image, wanted);
        assert_eq!(mend(&mut image), 0, "what is mended stays");
    }

    #[test]
    fn other_images_stay_as_they_are() {
        let mut image: Vec<u8> = (0..=255).cycle().take(70_000).collect();
        let before = image.clone();
        assert_eq!((mend(&mut image), mend(&mut [])), (0, 0));
        assert_eq!(image, before);
    }
}
