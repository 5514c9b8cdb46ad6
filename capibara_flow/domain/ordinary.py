"""Ordinary texts of every field, in each language: what a question has to stand out against. Pure data.

They are made up and say the same in both languages, so that the levels of two languages differ by the language alone.
"""

#: By ISO 639-1 code.
TEXTS = {
    "en": (
        "Bring a large pot of water to the boil, add salt and cook the pasta for nine minutes. Meanwhile fry the onion and garlic in "
        "olive oil until golden, then stir in the tomatoes and let the sauce simmer.",
        "The home team scored twice in the second half and won the match by two goals to one. The goalkeeper was sent off, and the "
        "coach complained about the referee after the final whistle.",
        "To open an account, bring proof of identity and of your address to any branch. A monthly fee is charged unless the balance "
        "stays above the minimum, and transfers within the country are free.",
        "A cold front will bring rain and strong wind from the west during the night. Temperatures fall to four degrees by morning, "
        "with snow above a thousand metres and clear skies along the coast.",
        "Take one tablet with water twice a day after meals. Common side effects are headache and nausea; see a doctor if a rash "
        "appears, and do not use this medicine during pregnancy.",
        "The tenant shall pay the rent by the fifth day of each month. Either party may end this contract in writing with three "
        "months' notice, and the deposit is returned once the keys are handed over.",
        "Install the package, edit the configuration file and restart the server. If the connection is refused, check that the port "
        "is open and that the user has permission to read the directory.",
        "The king died without an heir, and his cousins fought over the crown for eleven years. The war ended with a treaty that "
        "divided the kingdom and gave the northern castles to the duke.",
        "The second movement opens with a slow melody for the cello, taken up by the violins and then by the whole orchestra. The "
        "composer wrote the symphony in one summer and conducted its first performance.",
        "The planet orbits a small red star every eleven days. Its mass is five times that of the Earth, and astronomers measured the "
        "light that passes through its atmosphere with a space telescope.",
        "The hotel lies ten minutes on foot from the old town. Breakfast is included, rooms have a balcony over the bay, and a "
        "shuttle leaves for the airport every hour until midnight.",
        "Sow the seeds in early spring under a thin layer of soil and keep them moist. Plant the seedlings outside after the last "
        "frost, in a sunny place, half a metre apart.",
        "Change the oil and the filter every fifteen thousand kilometres. When the warning light stays on, stop the car, let the "
        "engine cool down and check the level of the coolant before you drive on.",
        "Cats sleep up to sixteen hours a day and hunt mostly at dusk. A kitten stays with its mother for eight weeks, and learns "
        "from her what to eat and how to wash itself.",
        "A triangle with two equal sides has two equal angles. To prove it, draw the line from the top to the middle of the base and "
        "show that both halves are congruent.",
        "Inflation slowed to three per cent in the first quarter, while exports grew. The central bank left interest rates unchanged "
        "and expects unemployment to fall slightly by the end of the year.",
        "The film tells the story of two sisters who inherit a farm and find their grandfather's letters. It was shot in black and "
        "white and won the prize of the jury at the festival.",
        "When the wire is heated, its electrical resistance grows. The experiment measures the current at several voltages and shows "
        "that the power lost as heat rises with the square of the current.",
        "She painted the harbour again and again, in thin layers of blue and grey. The museum shows forty of her pictures and the "
        "sketchbooks that she filled during her years in the village.",
        "The shirt is made of organic cotton and comes in five colours. Wash it at thirty degrees with similar colours, do not bleach "
        "it, and iron it inside out while it is still damp.",
        "The express train leaves at half past seven from platform four and stops only twice. Seats can be reserved up to one hour "
        "before departure, and bicycles need a ticket of their own.",
        "White gives up a pawn to open the centre and bring out the pieces quickly. Black should castle early and return the pawn, "
        "after which the endgame is roughly even.",
        "Employees are entitled to twenty-five days of leave a year, which have to be requested from their manager two weeks ahead. "
        "Days that were not taken expire at the end of March.",
        "The cells divide every few hours and carry copies of the same genes. Proteins on their surface recognise other cells, and "
        "when this fails the immune system attacks the body's own tissue.",
    ),
    "es": (
        "Pon a hervir una olla grande de agua, añade sal y cuece la pasta nueve minutos. Mientras tanto, sofríe la cebolla y el ajo "
        "en aceite de oliva hasta que se doren, añade el tomate y deja reducir la salsa.",
        "El equipo local marcó dos veces en la segunda parte y ganó el partido por dos goles a uno. El portero fue expulsado y el "
        "entrenador se quejó del árbitro tras el pitido final.",
        "Para abrir una cuenta, lleve a cualquier oficina su documento de identidad y un justificante de domicilio. Se cobra una "
        "comisión mensual salvo que el saldo supere el mínimo, y las transferencias nacionales son gratuitas.",
        "Un frente frío traerá lluvia y viento fuerte del oeste durante la noche. Las temperaturas bajarán a cuatro grados por la "
        "mañana, con nieve por encima de los mil metros y cielo despejado en la costa.",
        "Tome un comprimido con agua dos veces al día después de las comidas. Los efectos secundarios frecuentes son dolor de cabeza "
        "y náuseas; acuda al médico si aparece una erupción y no lo use durante el embarazo.",
        "El arrendatario pagará la renta antes del día cinco de cada mes. Cualquiera de las partes puede resolver el contrato por "
        "escrito con tres meses de antelación, y la fianza se devuelve al entregar las llaves.",
        "Instala el paquete, edita el archivo de configuración y reinicia el servidor. Si se rechaza la conexión, comprueba que el "
        "puerto está abierto y que el usuario tiene permiso para leer el directorio.",
        "El rey murió sin heredero y sus primos lucharon por la corona durante once años. La guerra terminó con un tratado que "
        "dividió el reino y entregó al duque los castillos del norte.",
        "El segundo movimiento se abre con una melodía lenta del violonchelo, que retoman los violines y después toda la orquesta. El "
        "compositor escribió la sinfonía en un verano y dirigió su estreno.",
        "El planeta gira alrededor de una pequeña estrella roja cada once días. Su masa es cinco veces la de la Tierra, y los "
        "astrónomos midieron la luz que atraviesa su atmósfera con un telescopio espacial.",
        "El hotel está a diez minutos a pie del casco antiguo. El desayuno está incluido, las habitaciones tienen balcón sobre la "
        "bahía y cada hora sale un autobús al aeropuerto hasta medianoche.",
        "Siembra las semillas a principios de primavera bajo una capa fina de tierra y mantenlas húmedas. Trasplanta los brotes al "
        "exterior tras la última helada, en un lugar soleado, a medio metro de distancia.",
        "Cambie el aceite y el filtro cada quince mil kilómetros. Si la luz de aviso sigue encendida, detenga el coche, deje enfriar "
        "el motor y compruebe el nivel del refrigerante antes de continuar.",
        "Los gatos duermen hasta dieciséis horas al día y cazan sobre todo al anochecer. La cría se queda con su madre ocho semanas y "
        "aprende de ella qué comer y cómo lavarse.",
        "Un triángulo con dos lados iguales tiene dos ángulos iguales. Para demostrarlo, traza la recta desde el vértice hasta el "
        "centro de la base y muestra que ambas mitades son congruentes.",
        "La inflación se moderó al tres por ciento en el primer trimestre, mientras crecían las exportaciones. El banco central "
        "mantuvo los tipos de interés y espera que el paro baje ligeramente a final de año.",
        "La película cuenta la historia de dos hermanas que heredan una granja y encuentran las cartas de su abuelo. Se rodó en "
        "blanco y negro y ganó el premio del jurado en el festival.",
        "Cuando se calienta el cable, crece su resistencia eléctrica. El experimento mide la corriente a varias tensiones y muestra "
        "que la potencia perdida en calor aumenta con el cuadrado de la corriente.",
        "Pintó el puerto una y otra vez, en capas finas de azul y gris. El museo muestra cuarenta de sus cuadros y los cuadernos que "
        "llenó durante los años que pasó en el pueblo.",
        "La camisa es de algodón orgánico y se vende en cinco colores. Lávela a treinta grados con colores parecidos, no use lejía y "
        "plánchela del revés cuando todavía esté húmeda.",
        "El tren rápido sale a las siete y media del andén cuatro y solo para dos veces. Los asientos se reservan hasta una hora "
        "antes de la salida y las bicicletas necesitan su propio billete.",
        "Las blancas entregan un peón para abrir el centro y sacar pronto las piezas. Las negras deben enrocar cuanto antes y "
        "devolver el peón, tras lo cual el final queda más o menos igualado.",
        "Los empleados tienen derecho a veinticinco días de vacaciones al año, que se piden al responsable con dos semanas de "
        "antelación. Los días no disfrutados caducan a finales de marzo.",
        "Las células se dividen cada pocas horas y llevan copias de los mismos genes. Las proteínas de su superficie reconocen a "
        "otras células y, cuando esto falla, el sistema inmunitario ataca los tejidos del propio cuerpo.",
    ),
}
