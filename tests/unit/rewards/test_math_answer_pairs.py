"""Pairs of reference and answer: which say the same and which do not. Every rule of the comparison has its table."""

from __future__ import annotations

import pytest

from rewards.math_compare import compare_texts

SAME_NUMBERS = [
    ("1000", "1,000"), ("1000", "1{,}000"), ("1000", r"1\,000"), ("1000", "1 000"), ("1000", "1000.00"),
    ("1000000", "1 000 000"), ("0.5", "1/2"), ("0.5", ".5"), ("0.5", r"50\%"), (r"50\%", "0.5"), (r"50\%", "50"),
    ("50", r"50\%"), ("5", r"500\%"), (r"\frac{1}{3}", "0.3333333333333333"), (r"\frac13", "1/3"),
    (r"\frac{1}{3}", r"\frac{2}{6}"), (r"2\frac{1}{2}", "5/2"), (r"2\frac12", "2.5"), (r"\frac{5}{2}", "2 1/2"),
    (r"\frac{5}{2}", r"2\ 1/2"), (r"1.5\times 10^{3}", "1500"), ("1500", "1.5e3"), ("1500", r"1.5 \cdot 10^3"),
    ("1500", "1.5*10^3"), (r"3\times 10^8", "300000000"), ("-3", "- 3"), ("-3", "\u22123"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"-\frac{1}{2}", r"\frac{1}{-2}"), (r"-\frac12", "-0.5"),
    (r"\$5", "5 dollars"), (r"\$5", "5"), ("5", r"\$5.00"), (r"\$1,250", "1250 dollars"),
    (r"5.4 \text{ cents}", "5.4"), ("10", "\u20ac10"), ("12", "12 cm"), ("12", "12cm"), (r"12\text{ cm}", "12"),
    (r"12\text{ cm}^2", r"12\mathrm{~cm}^2"), ("12", r"12 \mathrm{cm}"), ("12", r"12\,\text{cm}^3"),
    (r"12\text{ feet}", "12 ft"), ("12", "12 m"), ("12", "12 m/s"), ("12", r"12\text{ m/s}"),
    ("12", "12 miles per hour"), ("60", "60 km/h"), ("12", r"12^\circ"), (r"12^\circ", "12"),
    (r"12^\circ", r"12 \text{ degrees}"), ("12", r"12 \text{ square units}"), ("3", "x=3"), ("x=3", "3"),
    ("x = 3", "x=3"), ("3", "x=3=3"), ("42", r"6 \cdot 7 = 42"), (r"9\text{ a.m.}", "9 AM"),
    (r"9\text{ a.m.}", "9:00 a.m."), ("4:30", "4:30 p.m."), (r"\text{4:30 p.m.}", "4:30 PM"),
    (r"\text{4:30 p.m.}", "4:30"), ("100!", "100!"), ("120", "5!"), ("10", r"\binom{5}{2}"), ("2^{10}", "1024"),
    ("1024", "2^10"), ("2^{2010}", "2^{2010}"), ("2^{2010}", "4^{1005}"),
]  # fmt: skip
DIFFERENT_NUMBERS = [
    ("1000", "1.000"), ("0.5", "50"), ("50", "0.5"), (r"\frac{1}{3}", "0.333"), ("1/3", r"33.33\%"), ("7", "seven"),
    ("21/2", "2 1/2"), (r"5 \text{ cents}", "5 dollars"), (r"12\text{ cm}", r"12 \text{ cm}^2"),
    (r"12\text{ feet}", "12 inches"), (r"30^\circ", r"\frac{\pi}{6}"), ("x=3", "y=3"), ("42", "41=42"),
    (r"9\text{ a.m.}", r"9\text{ p.m.}"), (r"4:30\text{ p.m.}", "16:30"), ("2^{2010}", "2^{2009}"),
]  # fmt: skip
SAME_EXPRESSIONS = [
    ("2x+1", "1+2x"), ("x^2-1", "(x-1)(x+1)"), (r"\sqrt{8}", r"2\sqrt{2}"), (r"2\sqrt2", r"\sqrt 8"),
    (r"\sqrt{2}/2", r"\frac{1}{\sqrt{2}}"), (r"\sqrt[3]{8}", "2"), ("2", r"\sqrt{4}"), (r"\pi", "pi"),
    (r"2\pi", "2pi"), (r"6\pi", r"6 \pi \text{ cm}"), (r"\frac{\pi}{4}", r"\pi/4"),
    (r"\frac{3\pi}{4}", r"\frac34\pi"), ("e^2", "exp(2)"), ("e^x", r"\exp(x)"), (r"\ln 2", r"\log 2"),
    (r"\sin^2 x", r"1-\cos^2 x"), (r"\tan x", r"\frac{\sin x}{\cos x}"), (r"\log_2 8", "3"), ("i", r"\sqrt{-1}"),
    ("3+4i", "4i+3"), (r"\sqrt{x^2}", "|x|"), (r"\frac{x}{y}", "x/y"), ("x^{1/2}", r"\sqrt{x}"),
    (r"\frac{1}{x+1}", "(x+1)^{-1}"), ("2^{x+1}", r"2\cdot2^x"), ("ab", "ba"), ("a^2b", "ba^2"),
    (r"\alpha+\beta", r"\beta+\alpha"), ("x_1+x_2", "x_2+x_1"), (r"2\sin x\cos x", r"\sin 2x"),
    (r"2\sin(x)\cos(x)", r"\sin(2x)"), (r"\frac{\sqrt{3}}{2}", r"\cos 30^\circ"), (r"\arctan 1", r"\frac{\pi}{4}"),
    (r"\tan^{-1}(1)", r"\frac{\pi}{4}"),
]  # fmt: skip
DIFFERENT_EXPRESSIONS = [
    ("2x+1", "2y+1"), ("x^2", "x^3"), (r"2\sqrt{2}", "2.828"), (r"\pi", "3.14159"), ("3+4i", "3-4i"), ("|x|", "x"),
]  # fmt: skip
SAME_EQUATIONS = [
    ("y=2x+3", "2x+3"), ("2x+3", "y=2x+3"), ("y=2x+3", "y = 3+2x"), ("y=2x+3", "2x-y+3=0"),
    ("x^2+y^2=1", "2x^2+2y^2=2"), ("f(x)=2x", "2x"), ("f(x)=2x", "f(x)=2x"), ("f(x)=2x", "y=2x"),
]  # fmt: skip
DIFFERENT_EQUATIONS = [
    ("x^2+y^2=1", "x^2+y^2=2"), ("x+y=0", "0"), ("0", "x+y=0"), ("f(x)=2x", "g(x)=2x"),
]  # fmt: skip
SAME_INTERVALS = [
    ("(0,1)", "0<x<1"), ("0<x<1", "(0,1)"), (r"[0,\infty)", r"x\ge0"), (r"x\geq 0", r"[0,\infty)"),
    (r"(-\infty,0)\cup(0,\infty)", r"x\neq 0"), (r"x \ne 0", r"(-\infty,0)\cup(0,\infty)"),
    (r"(-\infty,\infty)", r"\mathbb{R}"), (r"(1,2)\cup(3,4)", r"(3,4)\cup(1,2)"), ("[1,2]", r"1 \le x \le 2"),
    ("[1,2]", r"x\in[1,2]"), (r"x<1 \text{ or } x>3", r"(-\infty,1)\cup(3,\infty)"),
    (r"(-\infty,1)\cup(3,\infty)", r"x<1 \text{ or } x>3"), (r"(-\infty,1)\cup(3,\infty)", "x<1, x>3"),
    ("x>2", "2<x"), (r"[0,2\pi)", r"0\le x<2\pi"), (r"(-5, \infty)", r"(-5,+\infty)"),
    (r"\{-1\} \cup [0,7)", "{-1} ∪ [0, 7)"), (r"\{1,2\} \cup [3,7)", "[3, 7) ∪ {1, 2}"), ("[2,5]", r"2 \le f(x) \le 5"),
]  # fmt: skip
DIFFERENT_INTERVALS = [
    ("(0,1)", "[0,1]"), (r"(1,2)\cup(3,4)", "(1,2)"), ("(1,2)", "(2,1)"), ("x>2", r"x\ge 2"), ("[2,2]", "2"),
    (r"(-\infty, 5]", r"(-\infty, 5)"), (r"\{-1\} \cup [0,7)", "{1} ∪ [0, 7)"), ("[2,5]", r"2 < f(x) \le 5"),
]  # fmt: skip
SAME_COLLECTIONS = [
    ("(1,2)", "(1, 2)"), ("(1,2)", "1,2"), ("1,2", "(1,2)"), ("1,2", "2,1"), (r"\{1,2\}", "1,2"), ("1,2", r"\{2,1\}"),
    (r"1 \text{ and } 2", "2, 1"), ("x=1,x=2", "1,2"), (r"x=1 \text{ or } x=2", "2,1"),
    ("1,2", r"x=1 \text{ or } x=2"), ("x=1,y=2", "(1,2)"), ("(1,2)", "x=1, y=2"), ("x=1,y=2", "y=2,x=1"),
    (r"\pm 2", "2,-2"), ("2,-2", r"\pm 2"), (r"x=\pm2", r"\pm 2"), (r"\pm\sqrt{3}", r"\sqrt3,-\sqrt3"),
    (r"1\pm\sqrt2", r"1+\sqrt2, 1-\sqrt2"), ("(1,2),(3,4)", "(3,4),(1,2)"), ("(1,2),(3,4)", r"\{(1,2),(3,4)\}"),
    ("(x,y)=(1,2)", "(1,2)"), (r"\left(\frac12,1\right)", "(0.5,1)"), (r"\emptyset", r"\{\}"),
    ("2,3,5", r"2, 3, \text{ and } 5"), ("2,3,5", "2, 3 and 5"), ("3,4", "3;4"), ("12,34", "34,12"),
    (r"\langle 1,2\rangle", "(1,2)"), ("(3,100)", "(3, 100)"), ("100,200", "100, 200"), ("1,200", "1, 200"),
    ("1,200", "1200"),
]  # fmt: skip
DIFFERENT_COLLECTIONS = [
    ("(1,2)", "2,1"), (r"\{1,2,3\}", r"\{1,2\}"), ("1,2,3", "1,2"), ("1,2", "1,2,3"), ("1", "1,2"), ("1,2", "1"),
    ("x=1,y=2", "2,1"), (r"\pm 2", "2"), ("(1,2),(3,4)", "(1,2)"), ("(1,2,3)", "(1,3,2)"),
]  # fmt: skip
SAME_MATRICES = [
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    (r"\begin{pmatrix} 1/2 \\ 1 \end{pmatrix}", r"\begin{pmatrix} \frac12 \\ 1 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\frac12\begin{pmatrix} 2 \\ 4 \end{pmatrix}"),
    (r"\begin{pmatrix}-1&0\\0&-1\end{pmatrix}", r"-\mathbf{I}"), (r"\begin{pmatrix}2&0\\0&2\end{pmatrix}", "2I"),
]  # fmt: skip
DIFFERENT_MATRICES = [
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    (r"\begin{pmatrix}-1&0\\0&-1\end{pmatrix}", "I"), (r"\begin{pmatrix}2&0&0\\0&2&0\end{pmatrix}", "2I"),
]  # fmt: skip
SAME_WORDS = [
    (r"\text{east}", "East"), (r"\text{Monday}", "Monday."), (r"\text{(C)}", "C"), ("C", "(C)"), (r"\text{C}", "c"),
    ("C", r"\text{(C) }12"), ("C", "C. 12"), (r"\text{Yes}", "yes"), (r"\text{no solution}", "No solution."),
    (r"\text{A,C,F}", "A, C, F"), (r"\text{A,C,F}", "F, A, C"), (r"\text{ellipse}", r"\text{an ellipse}"),
    (r"\text{June 20}", "June 20"),
]  # fmt: skip
DIFFERENT_WORDS = [
    ("C", "D"), (r"\text{even}", "odd"), (r"\text{June 20}", "June 21"),
]  # fmt: skip
SAME_RATIOS_AND_BASES = [
    ("3:4", "3:4"), ("3:4", "6:8"), ("3:4", r"\frac34"), ("1:2:3", "2:4:6"), ("1101_4", "1101_4"), ("1101_4", "1101"),
    ("1101_4", "1101_{4}"), ("1101_4", r"1101_{\text{four}}"),
]  # fmt: skip
DIFFERENT_RATIOS_AND_BASES = [
    ("3:4", "4:3"), ("1101_4", "1100_4"), ("1101_4", "1101_5"),
]  # fmt: skip
SAME_MIXED = [
    (r"\frac{1}{2}", "\u00bd"), ("x^2", "x\u00b2"), ("5", "5,"), ("5", "5."), ("5", "+5"), ("5", "(5)"), ("5", "{5}"),
    ("5", "[5]"), ("5", "5.0"), ("5", "05"), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"16\sqrt{3}", "16 * sqrt(3)"), ("-2*pi", r"-2\pi"), ("sqrt(2)", r"\sqrt2"), ("1/2*x", r"\frac{x}{2}"),
    ("x**2", "x^2"), (r"\frac{a}{b}", r"\frac ab"), (r"\frac{1}{2}", "1 / 2"), (r"\frac{1}{2}", r"\dfrac 12"),
    (r"\frac{3}{4}", r"3 \div 4"), (r"2 \cdot 3^2", "18"), ("18", r"2\times 3^{2}"),
    (r"\sqrt{3}-5i", r"-5i+\sqrt{3}"), (r"\overline{AB}", r"\overline{AB}"), (r"0.\overline{3}", r"\frac13"),
    (r"\frac{1}{3}", r"0.\overline{3}"), (r"0.\overline{12}", r"\frac{4}{33}"), (r"6\text{ and }8", "6,8"),
    (r"x \in \{1,2\}", "1,2"), (r"\infty", r"+\infty"), (r"\infty", r"\infty"), (r"\text{DNE}", "DNE"),
    (r"4\sqrt{5}", r"4\sqrt{5}\text{ units}"), (r"10\%", "0.1"), ("15", r"15\text{ ways.}"), (r"8\text{ meals}", "8"),
    ("8", r"8 \text{ (eight)}"), (r"\frac{9}{4}, -\frac{9}{4}", r"\pm\frac94"), (r"k \leq 2", r"(-\infty,2]"),
    ("a<b", "b>a"), (r"\cot x", r"\frac{1}{\tan x}"), ("n(n+1)/2", r"\frac{n^2+n}{2}"),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"), ("n!", r"n\cdot(n-1)!"), (r"\lfloor 3.7 \rfloor", "3"),
    ("2^{n}-1", "2^n - 1"), (r"\frac{1}{2}\ln 2", r"\ln\sqrt{2}"), ("p - q", "-(q - p)"),
]  # fmt: skip
DIFFERENT_MIXED = [
    ("42", "42.0000001"), ("42", "4200"), ("42", "-42"), ("42", "42x"), ("x", "42x"), ("42", "42+x"),
    ("10", "10^{10^{10}}"), (r"-\infty", r"\infty"), ("-x", "x"),
]  # fmt: skip
SAME_MORE = [
    ("1/3", r"{1 \over 3}"), ("1/3", r"1\over3"), (r"\frac{1}{3}", r"\frac1{3}"), (r"\frac{1}{3}", r"\frac{1}3"),
    ("1/3", r"\frac{1}{3}\ \mathrm{m}"), ("9", "9."), ("9", r"\mathbf{9}"), ("9", r"{\bf 9}"),
    ("9", r"\underline{9}"), ("9", r"\displaystyle 9"), ("9", r"\textbf{9}"), ("9", r"\color{red}{9}"),
    ("9", r"\textcolor{blue}{9}"), (r"28\%", "28 percent"), (r"28\%", "28 percentages"),
    (r"28\%", r"28\text{ percent}"), (r"28\%", "0.28"), ("x=1", "1=x"), (r"x\leq y", r"y\geq x"), ("2x<4", "x<2"),
    (r"-x\ge1", r"x\le-1"), (r"x\in\{1,2\}", r"\{1,2\}"), ("x>1", r"\{x \mid x>1\}"), (r"(1,\infty)", r"\{x | x>1\}"),
    (r"(1,\infty)", r"\{x\in\mathbb{R} : x>1\}"), (r"\mathbb{R}", r"x\in\mathbb{R}"),
    (r"(-\infty,0)\cup(0,\infty)", r"\mathbb{R}\setminus\{0\}"), (r"\mathbb{R}\setminus\{0\}", r"x\ne0"),
    (r"\mathbb{R}", r"(-\infty,\infty)"), (r"(-\infty;2)\cup(3;+\infty)", r"(-\infty,2)\cup(3,\infty)"),
    (r"\{1\}\cup[2,3]", r"[2,3]\cup\{1\}"), (r"\text{all real numbers}", r"(-\infty,\infty)"),
    (r"(-\infty,\infty)", r"\text{all real numbers}"), (r"(-\infty,\infty)", "All real numbers"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\left(\begin{array}{c}1\\2\end{array}\right)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\[4pt]2\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}^T"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\\\end{pmatrix}"),
    ("-2", r"\begin{vmatrix}1&2\\3&4\end{vmatrix}"), ("f(x)=2x", "f(n)=2n"), ("f(x)=x^2+1", "f(t)=t^2+1"),
    ("P(x)=x+1", "x+1"), ("(a,b,c)=(0,0,0)", "a=0,b=0,c=0"), ("(x,y,z)=(1,1,1)", "x=y=z=1"), ("x=y=z=1", "(1,1,1)"),
    (r"30^{\circ},60^{\circ}", "30,60"), (r"30^{\circ},60^{\circ}", r"60^\circ,30^\circ"),
    (r"V=12\mathrm{~cm}^{3}", "12"), (r"3\mathrm{~km}/\mathrm{h}", "3"), ("3", r"3\mathrm{~km}/\mathrm{h}"),
    (r"60\mathrm{~km}/\mathrm{h}", "60 km/h"), (r"12\mathrm{~cm}^{2}", "12 cm^2"),
    (r"12\mathrm{~cm}^{2}", "12 square centimeters"), ("12", "12 sq. ft."), (r"S=\frac{\pi}{4}", r"\pi/4"),
    ("(-1)^{n-1}", "(-1)^{n+1}"), ("n=1,2,4", "1,2,4"), ("1,2,4", "n=1,2,4"), ("n=1,2,4", "n=4,2,1"),
    (r"n\in\{1,2,4\}", "n=1,2,4"), (r"f(x)=0 \text{ or } f(x)=x", r"f(x)=x \text{ or } f(x)=0"),
    ("x=2, y=-3, z=5", "(2,-3,5)"), ("(2,-3,5)", "x=2, y=-3, z=5"), ("x=2,y=3", r"x=2 \text{ and } y=3"),
    ("x=2,y=3", "(x,y)=(2,3)"), ("(2,3)", "(x,y)=(2,3)"), ("(2,3)", "x=2,y=3"), ("10:1", "10 : 1"),
    ("10:1", "10 to 1"), ("2:3", "2/3"), ("98!", "98!"), ("2^{98}", "2^{98}"), ("10^{-5}", "0.00001"),
    ("10^{-5}", "1e-5"), ("5/9", "5 / 9"), ("E", r"\mathrm{E}"), ("2.00", "2"), (r"\frac{1}{72}", r"\frac1{72}"),
    (r"-\frac{35}{9}", r"-\frac{35}{9}"), (r"\frac{-35}{9}", "-35/9"), (r"16^{\circ}", "16"),
    (r"3\frac{1}{2}", "7/2"), (r"3\frac{1}{2}", "3.5"), (r"\frac{1}{2}\text{ cm}", r"0.5\text{ cm}"),
    (r"\frac{1}{2}", "1:2"), (r"\text{true}", "True"), ("(A)", "A"), (r"\textbf{(A)}", r"\text{A}"),
    (r"\sqrt{3}", "3^{1/2}"), (r"\sqrt{3}", "3^{0.5}"), (r"\sqrt{3}", "1.7320508075688772"), (r"\ln(2)", "ln 2"),
    (r"\ln 2", r"\log_e 2"), (r"\log_{10} 100", "2"), (r"e^{i\pi}", "-1"), (r"\cos 60^\circ", "0.5"),
    (r"\sin\frac{\pi}{6}", r"\frac12"), (r"2\cos^2 x-1", r"\cos 2x"), (r"\frac{\sin 2x}{2}", r"\sin x\cos x"),
    (r"\sin^{-1} x", r"\arcsin x"), (r"\frac{d}{2}", r"\frac12 d"), ("2x^2+3x", "x(2x+3)"),
    ("(x-1)(x+2)", "(x+2)(x-1)"), ("7(x+3)(x-3)", "7x^2-63"), ("(x+1)^2", "x^2+2x+1"), (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"-\frac{1}{4}x+2", r"2-\frac{x}{4}"), ("6r^2-4r-24", "6r^2 - 4r - 24"), (r"1\frac{4}{5}", r"1 \frac{4}{5}"),
    (r"1\frac{4}{5}", r"\frac{9}{5}"), (r"\$18.90", "18.9"), (r"\$18.90", r"\$18.9"), (r"\$32,\!348", "32348"),
    (r"900,\!000,\!000", r"9\times10^8"), ("10{,}000", "10000"), (r"76^\circ", "76 degrees"), (r"65\%", "65"),
    (r"65\%", r"65\% of the time"), (r"4:30\text{ p.m.}", "4:30"), (r"45\text{ mph}", "45 miles per hour"),
    (r"135\text{ square feet}", "135 ft^2"), (r"25 \text{ ft}", "25 feet"), (r"8\text{ meals}", "8 meals"),
    (r"\text{Navin}", "Navin"), ("1101_4", "1101_{4}"), ("2516_8", "2516_{8}"), ("4343_6", "4343"),
    ("0.0011_2", "0.0011_{2}"), (r"3 \pm 2 \sqrt{2}", r"3+2\sqrt{2}, 3-2\sqrt{2}"),
    (r"3 \pm 2 \sqrt{2}", r"3 \pm \sqrt{8}"), ("6 + 8i, 6 + 17i", "6+17i,6+8i"),
    (r"\{-1\} \cup [0,7)", r"[0,7)\cup\{-1\}"), ("x^4+x^2-10x-24", "x^4 + x^2 - 10x - 24"),
    (r"y = -\frac{1}{2} x^2 + 4x - 6", r"-\frac{x^2}{2}+4x-6"), ("5x - 7y + 11z + 4 = 0", "-5x+7y-11z=4"),
    (r"\frac{x^2}{16} - \frac{y^2}{9} = 1", "9x^2-16y^2=144"), ("f(2) < f(1) < f(4)", "f(2)<f(1)<f(4)"),
    ("f(2) < f(1) < f(4)", "f(4)>f(1)>f(2)"), (r"0, \pi, 2\pi", r"\{0,\pi,2\pi\}"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(r,\theta)=(3,\frac{\pi}{2})"), (r"\sin^2t", r"\sin^2(t)"),
    (r"\frac{1}{2^{99}}", "2^{-99}"), (r"1 - \frac{1}{\mathrm{e}}", "1-e^{-1}"), ("4t", "4t"), ("2k", "2k"),
    ("2k", "k+k"), (r"\frac{3}{4}", r"75\%"), ("0.75", "3/4"), ("1", "0.9999999999999"), ("100", "1e2"),
    ("12", "12.000"), ("12", "1.2e1"), ("12", "012"), (r"\infty", "infinity"), (r"\frac{0}{5}", "0"), ("0", "-0"),
    ("0", "0.0"), (r"12 \text{ and } 13", "12,13"), (r"12\text{ and }13", "13 and 12"),
    (r"\frac{AB}{CD}=\frac12", r"\frac12"), (r"\angle ABC=30^\circ", r"30^\circ"), (r"\angle A = 30^\circ", "30"),
    ("30", r"\angle A=30^\circ"), ("|z|=5", "5"), ("AB=5", "5"), ("5", "AB=5"), ("a_n=2n+1", "2n+1"),
    ("a_{n}=2^{n}", "2^n"), ("S_n=n^2", "n^2"), (r"\overrightarrow{AB}=(1,2)", "(1,2)"), (r"\vec{v}=(1,2)", "(1,2)"),
    (r"\frac{dy}{dx}=2x", "2x"), ("f'(x)=2x", "2x"), ("y'=2x", "2x"),
]  # fmt: skip
DIFFERENT_MORE = [
    (r"28\%", r"2800\%"), (r"28\%", r".28\%"), (r"[0,1)\cup[2,3)", r"[0,1)\cup[2,3]"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"), ("f(x)=2x", "f(n)=3n"),
    ("f(x)=2x", "2n"), ("n=1,2,4", "n=1,2"), ("f(x)=0,f(x)=x", "f(x)=0"), ("(2,3)", "x=3,y=2"), ("98!", "97!"),
    (r"3\frac{1}{2}", r"\frac{3}{2}"), (r"\text{Yes}", r"\text{No}"), (r"\textbf{(A)}", "(B)"),
    (r"\sqrt{3}", "1.732"), (r"\frac{\pi}{6}", r"30^\circ"), ("a-b", "b-a"), ("3x", "3y"),
    ("6r^2-4r-24", "6x^2-4x-24"), (r"45\text{ mph}", "45 km/h"), (r"\text{neither}", "Neither even nor odd"),
    ("4343_6", "4343_{10}"), (r"3 \pm 2 \sqrt{2}", r"3+2\sqrt2"), ("5x - 7y + 11z + 4 = 0", "5x-7y+11z-4=0"),
    ("f(2) < f(1) < f(4)", "f(1)<f(2)<f(4)"), (r"(3,\pi/2)", r"(3, 90^\circ)"), (r"\frac{1}{2^{99}}", "2^{-98}"),
    (r"\frac{20000}{\pi}", "6366.2"), ("1", "0.999999"), ("12", "12,000"), ("3.14", r"\pi"), ("2", "2i"), ("2i", "2"),
    ("2i", "-2i"), ("0", r"\emptyset"), ("5", "V"), ("12,13", "between 12 and 13"), ("52_8", "42"),
    (r"28\%", r".28\%"), ("5", ".5"),
]  # fmt: skip
SAME_WRITINGS = [
    (r"\frac12", r"\nicefrac{1}{2}"), ("60", r"60\degree"), ("5", "5℃"), ("5", "∴ 5"), ("5", r"5 \checkmark"),
    ("14", "= 14"), ("3:30", "3{:}30"), ("5", r"{\color{red}5}"), ("5", r"\framebox{5}"), ("5", r"5 \tag{1}"),
    ("45", r"45 \frac{\text{miles}}{\text{hour}}"), ("9.8", "9.8 m/s^2"), ("5", r"5\,\text{N}\cdot\text{m}"),
    ("5", r"5\ \text{kg}\cdot\text{m}/\text{s}^2"), (r"\frac{7}{9}\mathrm{~m}", r"\frac79"), ("5", r"5\ \Omega"),
    (r"30(\mathrm{~cm}^{2})", "30"), (r"18\mathrm{~min}", "18 minutes"), ("110_2", "110 in base 2"),
    ("110_2", r"110 \text{ (base 2)}"), ("110_2", "110_{(2)}"), ("53", "53_{10}"), ("17", "17th"),
    ("4", r"4^{\text{th}}"), ("5", "5 out of 36"),
    (r"\text{June 5}", "June 5th"), (r"\text{Tuesday}", "on Tuesday"), (r"\text{hyperbola}", "It is a hyperbola"),
    (r"33\frac13\%", r"\frac{100}{3}\%"), (r"33\frac13\%", "33 1/3%"),
    (r"12\frac12^\circ", "12.5"), (r"0.\dot{3}", r"\frac13"), (r"3\sqrt{10}", "3√10"), ("1000", "1'000"),
    (r"\sqrt{10}", "sqrt 10"), (r"1\pm\sqrt2", "1 +/- sqrt(2)"), (r"\log_2 5", "log2(5)"), (r"30^\circ", "30 deg"),
    ("5", "5 min"), ("2^n", "2ⁿ"), (r"x\in[1,2]", "x in [1,2]"), (r"\begin{pmatrix}1\\2\end{pmatrix}", "<1, 2>"),
    ("(2,3)", r"\{(2,3)\}"), ("(1,2)", r"\begin{cases} x=1\\y=2\end{cases}"), (r"30\text{ cents}", r"\$0.30"),
    (r"\frac{10}{3}", "3.333..."), (r"\frac16", r"0.1666\ldots"), (r"\frac{5}{36}", "5 out of 36"),
    ("70000", r"\$70k"), ("1200000", r"\$1.2M"), ("0.42", "42 hundredths"), ("196", "14 squared"),
    ("120", r"{10 \choose 3}"), (r"1:\sqrt2", r"\frac{1}{\sqrt2}"), (r"\infty", r"\text{infinity}"),
    (r"6 \text{ cis } 30^\circ", "3\\sqrt3+3i"), (r"x=k\pi, k\in\mathbb{Z}", r"x=n\pi, n\in\mathbb{Z}"),
    ("(1,2)", "P(1,2)"), (r"f^{-1}(x)=\frac{x-1}{2}", r"\frac{x-1}{2}"), ("B", "(B) 12"), ("15", r"\textbf{(C)}\ 15"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "[[1,2],[3,4]]"),
    (r"(-\infty,-1)\cup(-1,\infty)", r"\text{all real numbers except } x = -1"),
]  # fmt: skip
DIFFERENT_WRITINGS = [
    ("42", "42_5"), ("42", "42 hundredths"), ("42", "42 tenths"), ("14", "14 squared"), ("5", r"5 \text{ to } 6"),
    (r"15\text{ cm}^2", r"15\text{ m}^2"), ("2k", "2n"), ("16", r"\textbf{(C)}\ 15"), ("4", "42nd"),
    ("12", r"12 \pmod 7"),
    (r"\frac{10}{3}", "3.33"), (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "[[1,3],[2,4]]"), ("(1,2)", "P(2,1)"),
    (r"\mathbb{R}", r"\text{all real numbers except } -1"), ("70", r"\$70k"), ("k", "70k"), ("42", "A42"),
    (r"30\text{ cents}", r"\$30"), ("5", r"5\text{ at most}"), ("42", r"\text{42, but not really}"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        *SAME_NUMBERS,
        *SAME_EXPRESSIONS,
        *SAME_EQUATIONS,
        *SAME_INTERVALS,
        *SAME_COLLECTIONS,
        *SAME_MATRICES,
        *SAME_WORDS,
        *SAME_RATIOS_AND_BASES,
        *SAME_MIXED,
        *SAME_MORE,
        *SAME_WRITINGS,
    ],
)
def test_same(gold: str, answer: str) -> None:
    assert compare_texts(gold, answer).equal


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        *DIFFERENT_NUMBERS,
        *DIFFERENT_EXPRESSIONS,
        *DIFFERENT_EQUATIONS,
        *DIFFERENT_INTERVALS,
        *DIFFERENT_COLLECTIONS,
        *DIFFERENT_MATRICES,
        *DIFFERENT_WORDS,
        *DIFFERENT_RATIOS_AND_BASES,
        *DIFFERENT_MIXED,
        *DIFFERENT_MORE,
        *DIFFERENT_WRITINGS,
    ],
)
def test_different(gold: str, answer: str) -> None:
    assert not compare_texts(gold, answer).equal


@pytest.mark.parametrize(
    ("gold", "answer", "rule"),
    [
        ("0.5", "0.5", "same text"),
        ("East", "the east.", "same words"),
        ("0.5", "1/2", "number"),
        ("50\\%", "50", "percent"),
        ("1/3", "0.33333333333", "decimal"),
        ("x^2-1", "(x-1)(x+1)", "expression"),
        ("x+y=1", "2x+2y=2", "equation"),
        ("x>1", "(1,\\infty)", "real set"),
        ("(1,2)", "(2/2,2)", "tuple"),
        ("1,2", "2,1", "set"),
        ("3:4", "6:8", "ratio"),
        ("1101_4", "1101", "base"),
        ("9 a.m.", "9:00 am", "time of day"),
        ("C", "(C) 12", "option letter"),
    ],
)
def test_the_rule_is_named(gold: str, answer: str, rule: str) -> None:
    assert compare_texts(gold, answer).rule == rule
